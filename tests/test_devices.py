"""What holds on the CPU holds on a GPU too, in FP32 and in BF16: run on each device that there is."""

from __future__ import annotations

import asyncio
import copy
import math
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import Tensor

from models import tiny_model
from sluice.algorithms import policy_loss, resolve
from sluice.algorithms.losses import LossOutput
from sluice.data.batch import MicroBatch, Packing, make_minibatch
from sluice.engines.decoders import ModelDecoder, decoder_for
from sluice.engines.embedded import EmbeddedEngine
from sluice.engines.graphs import GraphedDecoder
from sluice.engines.packed import PackedDecoder
from sluice.engines.threads import StepThreads
from sluice.interfaces import Layout
from sluice.trainers.local import LocalTrainer
from sluice.trainers.model import PolicyModel
from sluice.trainers.optim import Optimizer, OptimizerSettings
from sluice.types import Sample, Sampling
from sluice.weights.in_process import InProcessWeights
from small_runs import finished, ledger_of, metrics_of, set_up, sluice, workplace

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SETTINGS = OptimizerSettings(1e-4, 0, "constant", 0.0, (0.9, 0.95), 1e-15, 0.0, 1.0)
CISPO = resolve("cispo")
MEAN_PROB_DIFFERENCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
"""Of engine and trainer, at most: less than a third of what other weights make."""

on_each_device = pytest.mark.parametrize("device", DEVICES)
in_each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def engine_of(model: PolicyModel) -> EmbeddedEngine:
    return EmbeddedEngine(model, lambda ids: "", vocab_size=128, num_slots=10)


def samples_of(engine: EmbeddedEngine, num: int = 32, longest: int = 150) -> list[Sample]:
    """More prompts than slots, in groups of four; completions that are mostly short and sometimes grow the cache."""
    lengths = random.Random(0)
    prompts = [[3 + (i // 4 + t) % 100 for t in range(1 + i // 4)] for i in range(num)]
    wanted = [longest if i % 8 == 0 else lengths.randrange(1, 30) for i in range(num)]

    async def all_of_them() -> list[Sample]:
        asked = [
            engine.generate(prompt, Sampling(max_new_tokens=new, seed=i, temperature=0.8))
            for i, (prompt, new) in enumerate(zip(prompts, wanted, strict=True))
        ]
        samples = []
        for i, (prompt, c) in enumerate(zip(prompts, await asyncio.gather(*asked), strict=True)):
            before, n = [0.0] * len(prompt), len(c.token_ids)
            weights, logprobs, versions = before + [1.0] * n, before + c.logprobs, [-1] * len(prompt) + [0] * n
            samples.append(Sample(prompt + c.token_ids, weights, logprobs, versions, 0.8, i // 4, i % 4))
        return samples

    return asyncio.run(all_of_them())


def trainer_of(model: PolicyModel, layout: Layout) -> LocalTrainer:
    return LocalTrainer(model, None, Optimizer(model.model, SETTINGS, 1), Packing(1, 300, layout), couples_tokens=False)


def prob_differences(model: PolicyModel, samples: list[Sample], layout: Layout = "packed") -> list[float]:
    """Of engine and trainer, token by token."""
    asyncio.run(trainer_of(model, layout).forward(samples, "old_logprobs"))
    return [
        abs(math.exp(a) - math.exp(b))
        for s in samples
        for a, b, w in zip(s.old_logprobs, s.logprobs, s.loss_weights, strict=True)
        if w
    ]


@on_each_device
@in_each_dtype
@pytest.mark.parametrize("architecture", ["qwen3", "mistral_window", "gemma2"])
def test_decoder_of_a_device(device: str, dtype: torch.dtype, architecture: str) -> None:
    """A GPU decodes models built like a llama by graphs, and in BF16 with its own kernel; others by their own forward."""
    decoder = decoder_for(tiny_model(architecture, dtype, device=device), StepThreads(torch.device(device)))
    if architecture == "gemma2":
        assert type(decoder) is ModelDecoder
    else:
        assert type(decoder) is (GraphedDecoder if device == "cuda" else PackedDecoder)
        assert decoder.by_token == (device == "cuda" and dtype == torch.bfloat16)


@on_each_device
@in_each_dtype
@pytest.mark.parametrize("architecture", ["qwen3", "mistral_window", "gemma2"])
def test_engine_and_trainer_agree_before_and_after_new_weights(
    device: str, dtype: torch.dtype, architecture: str
) -> None:
    """Through slots that are freed and moved, caches that grow, graphs that are replayed; and the same again with the same seeds."""
    model = tiny_model(architecture, dtype, device=device, scale=6.0)
    engine = engine_of(model)
    first = samples_of(engine)
    for layout in ("rows", "packed"):
        assert fmean(prob_differences(model, first, layout)) < MEAN_PROB_DIFFERENCE[dtype]
    assert [s.token_ids for s in samples_of(engine)] == [s.token_ids for s in first]
    with torch.no_grad():
        for weight in model.model.parameters():
            weight.mul_(1.5)
    assert fmean(prob_differences(model, first)) > 3 * MEAN_PROB_DIFFERENCE[dtype], "the weights should matter"
    asyncio.run(engine.update_weights(InProcessWeights(model), 1))
    assert fmean(prob_differences(model, samples_of(engine))) < MEAN_PROB_DIFFERENCE[dtype]


GPUS = DEVICES[1:]


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(16, 8, 128), (20, 1, 80), (6, 2, 96), (3, 3, 24)])
def test_fused_attention_is_that_of_the_formula(
    device: str, heads: int, kv_heads: int, size: int, window: int | None
) -> None:
    """In float64, over slots that are used to different lengths; what lies beyond is no number."""
    from sluice.engines import fused

    positions = torch.tensor([0, 3, 63, 64, 199, 127, 128], device=device)
    keys, values = (by_token(len(positions), kv_heads, 200, size, device) for _ in range(2))
    beyond = torch.arange(200, device=device) > positions[:, None]
    for cache in (keys, values):
        cache.transpose(1, 2)[beyond] = math.nan
    queries = torch.randn(len(positions), heads, size, device=device).bfloat16()
    found = fused.attend(positions, 0.3, queries, keys_as_they_lie(keys), values, window)
    hidden = beyond if window is None else beyond | (torch.arange(200, device=device) <= positions[:, None] - window)
    k, v = (x.nan_to_num().double().repeat_interleave(heads // kv_heads, 1) for x in (keys, values))
    scores = torch.einsum("nhd,nhcd->nhc", queries.double(), k) * 0.3
    weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    expected = torch.einsum("nhc,nhcd->nhd", weights, v).flatten(1)
    assert (found.double() - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("is_normed", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(16, 8, 128), (20, 1, 80), (6, 2, 96), (3, 3, 24)])
def test_fused_rotation_is_that_of_the_formula(
    device: str, heads: int, kv_heads: int, size: int, is_normed: bool
) -> None:
    """And nothing but the token's own place in the cache is written."""
    from sluice.engines import fused

    n, rotated = 7, heads + kv_heads
    positions = torch.tensor([0, 3, 63, 64, 19, 12, 8], device=device)
    qkv = torch.randn(n, rotated + kv_heads, size, device=device).bfloat16()
    norm = torch.randn(rotated, size, device=device).bfloat16() if is_normed else None
    turns = torch.polar(torch.ones(n, 1, size // 2, device=device), torch.randn(n, 1, size // 2, device=device))
    keys, values = (by_token(n + 2, kv_heads, 80, size, device).zero_() for _ in range(2))
    queries = fused.turn_and_write(qkv, norm, turns, positions, keys_as_they_lie(keys), values, 1e-6)
    exact = qkv[:, :rotated].double()
    if norm is not None:
        exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()
    pairs = torch.view_as_complex(exact.unflatten(-1, (-1, 2)).contiguous())
    expected = torch.view_as_real(pairs * turns).flatten(-2)
    rows = torch.arange(n, device=device)
    for found, wanted in (
        (queries, expected[:, :heads]),
        (keys[rows, :, positions], expected[:, heads:]),
        (values[rows, :, positions], qkv[:, rotated:].double()),
    ):
        assert (found.double() - wanted).norm() / wanted.norm() < 0.01
    for cache in (keys, values):
        assert int((cache != 0).sum()) <= n * kv_heads * size


@pytest.mark.parametrize("device", GPUS)
def test_fused_silu_is_that_of_the_formula(device: str) -> None:
    from sluice.engines import fused

    gate_up = torch.randn(5, 2 * 3000, device=device).bfloat16()
    gate, up = gate_up.double().chunk(2, 1)
    expected = gate * torch.sigmoid(gate) * up
    assert (fused.silu_product(gate_up).double() - expected).norm() / expected.norm() < 0.01


def by_token(slots: int, kv_heads: int, capacity: int, size: int, device: str) -> Tensor:
    """[slots, kv heads, capacity, size], as a cache that lies token by token."""
    return torch.randn(slots, capacity, kv_heads, size, device=device).bfloat16().transpose(1, 2)


def keys_as_they_lie(keys: Tensor) -> Tensor:
    """The cache has the last two dimensions of keys the other way round."""
    return keys.transpose(2, 3)


def loss_of(logprobs: Tensor, entropies: Tensor, batch: MicroBatch) -> LossOutput:
    columns = batch.old_logprobs, batch.advantages, batch.loss_weights, batch.sequence_ids
    return policy_loss(CISPO, logprobs, *columns, coefficients=batch.coefficients)


def gradients_of(model: PolicyModel, samples: list[Sample], layout: Layout) -> list[Tensor]:
    """Of one CISPO update, in FP32 on the CPU."""
    trainer = trainer_of(model, layout)
    asyncio.run(trainer.forward_backward(make_minibatch(samples, trainer.packing, CISPO, 0), loss_of))
    return [m.grad.cpu() for m in trainer.optimizer.masters if m.grad is not None]


@on_each_device
@in_each_dtype
@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_gradient_is_that_of_rows_in_fp32_on_the_cpu(device: str, dtype: torch.dtype, layout: Layout) -> None:
    """Of every weight; in BF16 as near as the rounding of the model itself lets it come."""
    exact = tiny_model("qwen3", torch.bfloat16).model.float()  # weights that BF16 can hold
    samples = samples_of(engine_of(PolicyModel(exact)), num=12, longest=40)
    for sample in samples:
        sample.old_logprobs = sample.logprobs
        sample.advantages = [(-1.0) ** sample.index] * len(sample)
    expected = gradients_of(PolicyModel(exact), samples, "rows")
    found = gradients_of(PolicyModel(copy.deepcopy(exact).to(device, dtype)), samples, layout)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        error = float((mine - theirs).norm() / theirs.norm())
        assert error < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with workplace(tmp_path, monkeypatch) as folder:
        set_up(folder)
        yield folder


@on_each_device
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_trains_and_its_steps_can_be_replayed(
    device: str, dtype: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all checks; a run of the same config samples the same tokens in its first step. Replay gives the same numbers, but
    not on a GPU in BF16, whose attention kernel adds up gradients in no fixed order."""
    where = (f"model.device={device}", f"model.dtype={dtype}")
    runs = [finished("train", "config.yaml", *where, name=name) for name in ("one", "two")]
    lines = metrics_of(runs[0])
    assert len(lines) == 3
    assert all(line["train/engine_prob_corr"] > 0.99 for line in lines)
    first = [[row["token_ids"] for row in ledger_of(run, 1)] for run in runs]
    assert first[0] == first[1]
    if (device, dtype) != ("cuda", "bfloat16"):
        assert sluice("replay", runs[0], "--step", "2") == 0, capsys.readouterr()
