"""The trainer's gradient is that of the samples one by one through the model's own forward, however they are cut and laid out."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from makers import make_char_tokenizer
from models import CONFIGS, tiny_model
from sluice.algorithms import Algorithm, LossOutput, policy_loss, resolve
from sluice.data.batch import Layout, MicroBatch, Minibatch, Packing, make_minibatch, pack
from sluice.errors import ConfigError, NonFiniteError
from sluice.trainers import logprobs as head
from sluice.trainers.local import LocalTrainer
from sluice.trainers.model import PolicyModel
from sluice.trainers.optim import Optimizer, OptimizerSettings
from sluice.types import Sample
from sluice.weights.group import Address
from sluice.weights.publication import WeightsMoved

SETTINGS = OptimizerSettings(1e-3, 0, "constant", 0.0, (0.9, 0.95), 1e-15, 0.0, 1.0)
LENGTHS = (7, 21, 12, 2, 16, 9)
each_layout = pytest.mark.parametrize("layout", ["rows", "packed"])


def trainer_of(
    model: PolicyModel,
    packing: Packing | None = None,
    tokenizer: Any = None,
    couples_tokens: bool = True,
    **settings: Any,
) -> LocalTrainer:
    optimizer = Optimizer(model.model, replace(SETTINGS, **settings), 100)
    return LocalTrainer(model, tokenizer, optimizer, packing or Packing(1, 40, "rows"), couples_tokens=couples_tokens)


def some_samples(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Sample]:
    """Of several temperatures, with environment tokens between the policy's; the ratios spread over both clip sides."""
    rng = np.random.default_rng(seed)
    samples = []
    for i, n in enumerate(lengths):
        weights = [0.0, 1.0, *(rng.random(n - 2) < 0.7).astype(float).tolist()]
        sample = Sample(
            rng.integers(3, 128, n).tolist(), weights, [-3.0] * n, [0] * n, 0.7 + 0.2 * (i % 3), i // 2, i % 2
        )
        sample.prompt_id = "p"
        sample.advantages = [rng.normal() if w else 0.0 for w in weights]
        sample.old_logprobs = rng.normal(-4.0, 2.0, n).tolist()
        samples.append(sample)
    return samples


def loss_of(name: str, **words: Any) -> Any:
    """The loss as the loop gives it to the trainer."""
    spec = row(name, **words)

    def loss(logprobs: Tensor, entropies: Tensor, batch: MicroBatch) -> LossOutput:
        columns = batch.old_logprobs, batch.advantages, batch.loss_weights, batch.sequence_ids
        return policy_loss(spec, logprobs, *columns, coefficients=batch.coefficients, entropies=entropies)

    return loss


def row(name: str, **words: Any) -> Algorithm:
    return resolve(name, words, max_new_tokens=16, group_size=2)


CISPO, GRPO = loss_of("cispo"), loss_of("grpo")
ROWS = {"cispo": row("cispo"), "grpo": row("grpo")}


def naive_logprobs(model: PolicyModel, sample: Sample) -> Tensor:
    """[T - 1] of all tokens but the first: one sequence, no padding, no mask, transformers' own forward."""
    logits = model.model(input_ids=torch.tensor([sample.token_ids])).logits[0, :-1].double() / sample.temperature
    for t, ids in enumerate(sample.kept_ids[1:]):
        if ids:
            dropped = torch.ones_like(logits[t], dtype=torch.bool).index_fill(0, torch.tensor(ids), False)
            logits[t] = logits[t].masked_fill(dropped, -torch.inf)
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(sample.token_ids[1:])[:, None])[:, 0]


def naive_gradient(model: PolicyModel, samples: Sequence[Sample], name: str) -> dict[str, Tensor]:
    def column(field: str) -> Tensor:
        return torch.tensor([v for s in samples for v in getattr(s, field)[1:]], dtype=torch.float64)

    ids = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([len(s) - 1 for s in samples]))
    spec = row(name)
    logprobs = torch.cat([naive_logprobs(model, sample) for sample in samples])
    policy_loss(
        spec, logprobs, column("old_logprobs"), column("advantages"), column("loss_weights"), ids
    ).loss.backward()
    return gradient_of(model)


def gradient_of(model: PolicyModel) -> dict[str, Tensor]:
    """And start anew."""
    gradients = {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}
    model.model.zero_grad()
    return gradients


def forward_backward(trainer: LocalTrainer, minibatch: Minibatch, loss: Any = CISPO) -> dict[str, float]:
    return asyncio.run(trainer.forward_backward(minibatch, loss)).values_by_name()


def gradient(model: PolicyModel, samples: Sequence[Sample], packing: Packing, name: str = "cispo") -> dict[str, Tensor]:
    spec = row(name)
    trainer = trainer_of(model, packing, couples_tokens=spec.couples_tokens)
    forward_backward(trainer, make_minibatch(samples, packing, spec, 0), loss_of(name))
    return gradient_of(model)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Of the size of the largest gradient of the model."""
    assert actual.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 0
    for name, wanted in expected.items():
        assert float((actual[name] - wanted).abs().max()) <= tolerance * scale, name


# the gradient


@each_layout
@pytest.mark.parametrize("architecture", CONFIGS)
def test_rows_and_packed_give_the_gradient_of_the_samples_one_by_one(architecture: str, layout: Layout):
    """Z5: neither padding, nor position ids, nor a neighbour in the row shows."""
    model, samples = tiny_model(architecture), some_samples()
    expected = naive_gradient(model, samples, "cispo")
    assert_same(gradient(model, samples, Packing(1, 1000, layout)), expected)


@each_layout
@pytest.mark.parametrize("architecture", CONFIGS)
def test_recomputed_activations_give_the_same_gradient(architecture: str, layout: Layout):
    """To the last bit; with dropout still off, and the engine's prompts still in the cache (both hang on the training flag)."""
    model, samples = tiny_model(architecture), some_samples()
    for module in model.body.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    expected = gradient(model, samples, Packing(1, 1000, layout))
    model.recompute_activations()
    actual = gradient(model, samples, Packing(1, 1000, layout))
    assert all(torch.equal(actual[name], wanted) for name, wanted in expected.items())
    assert not any(module.training for module in model.body.modules())
    cache = DynamicCache()
    ids = torch.tensor([[3, 4, 5]])
    model.hidden_states(ids, torch.arange(3)[None], cache=cache)
    assert cache.get_seq_length() == 3


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"trainer.compile needs a C\+\+ compiler"):
        tiny_model("qwen3").compile()


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")  # of torch, about what its compiler does
@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_forward_gives_the_same_gradient(recompute: bool):
    model, samples = tiny_model("qwen3"), some_samples()
    expected = gradient(model, samples, Packing(1, 40, "packed"))
    if recompute:
        model.recompute_activations()
    model.compile()
    assert_same(gradient(model, samples, Packing(1, 40, "packed")), expected)


@pytest.mark.parametrize("budget", [120, 2000])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_prompt_that_is_computed_once_gets_the_gradient_of_all_its_answers(architecture: str, budget: int):
    """Of several lengths, short and long (which are attended over in two ways), one budget cutting a group in two."""
    model = tiny_model(architecture)
    samples = some_samples((20, 20, 31, 44, 150, 170, 90, 85, 8))
    for i, sample in enumerate(samples):
        sample.group, prompt = i // 4, (6, 80, 3)[i // 4]
        sample.token_ids[:prompt] = samples[i - i % 4].token_ids[:prompt]
    samples[5].token_ids[:140] = samples[4].token_ids[:140]  # two answers may begin alike, too
    packing = Packing(1, budget, "packed")
    packed_tokens = sum(m.input_ids.numel() for m in make_minibatch(samples, packing, row("cispo"), 0).micro_batches)
    assert packed_tokens < sum(map(len, samples)) - 80
    expected = naive_gradient(model, samples, "cispo")
    assert_same(gradient(model, samples, packing), expected)


@each_layout
@pytest.mark.parametrize("budget", [30, 1000])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_the_gradient_is_that_of_the_truncated_distribution(architecture: str, budget: int, layout: Layout):
    """Z19, for top-p and top-k; some samples are drawn from whole, some tokens too."""
    model, samples, rng = tiny_model(architecture), some_samples(), np.random.default_rng(1)
    whole = naive_gradient(model, samples, "cispo")
    for i, sample in enumerate(samples[:-2]):
        ids = [
            [token, *rng.choice(3, size=(t + i) % 4, replace=False).tolist()]
            for t, token in enumerate(sample.token_ids)
        ]
        sample.kept_ids = [row if w and t % 5 else [] for t, (row, w) in enumerate(zip(ids, sample.loss_weights))]
    expected = naive_gradient(model, samples, "cispo")
    assert_same(gradient(model, samples, Packing(1, budget, layout)), expected)
    with pytest.raises(AssertionError):
        assert_same(whole, expected, tolerance=0.1)


@each_layout
@pytest.mark.parametrize("name", ["cispo", "grpo", "dr_grpo", "gspo"])
def test_tokens_per_micro_batch_do_not_change_the_gradient(name: str, layout: Layout):
    """Z3, for every denominator; and the learning signal is not all clipped away."""
    model, samples = tiny_model("qwen3"), some_samples()
    expected = naive_gradient(model, samples, name)
    for budget in (1, 30, 50, 1000):
        assert_same(gradient(model, samples, Packing(1, budget, layout), name), expected)


def test_the_cut_does_not_change_the_metrics():
    model, samples = tiny_model("qwen3"), some_samples()
    seen = [
        forward_backward(trainer_of(model), make_minibatch(samples, Packing(1, budget, "rows"), ROWS["grpo"], 0), GRPO)
        for budget in (1, 30, 1000)
    ]
    assert seen[0] == pytest.approx(seen[2], rel=1e-4)
    assert seen[1] == pytest.approx(seen[2], rel=1e-4)


@pytest.mark.parametrize("name", ["cispo", "grpo", "dr_grpo"])
def test_data_parallel_shards_add_up(name: str):
    """Two replicas, each with half of the samples and the divisors of all of them."""
    model, samples, packing = tiny_model("qwen3"), some_samples(), Packing(1, 30, "rows")
    expected = naive_gradient(model, samples, name)
    whole = make_minibatch(samples, Packing(1, 1, "rows"), row(name), 0).micro_batches  # one sample each
    shards = []
    for part in (samples[:4], samples[4:]):
        minibatch = Minibatch([m for m in whole if m.samples[0] in part], 0, 0)
        replica = copy.deepcopy(model)
        forward_backward(trainer_of(replica, packing), minibatch, loss_of(name))
        shards.append(gradient_of(replica))
    assert_same({k: shards[0][k] + shards[1][k] for k in shards[0]}, expected)


def test_a_sample_without_a_loss_token_changes_nothing():
    model, samples = tiny_model("qwen3"), some_samples()
    silent = some_samples([5], seed=9)[0]
    silent.loss_weights, silent.advantages = [0.0] * 5, [0.0] * 5
    for name in ("cispo", "grpo"):
        expected = naive_gradient(model, samples, name)
        for budget in (1, 1000):
            assert_same(gradient(model, [*samples, silent], Packing(1, budget, "rows"), name), expected)
    assert silent.ratios == [1.0] * 5


def chunks_of(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    monkeypatch.setattr(head, "chunk_tokens", lambda *_: num_tokens)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_chunks_of_the_head_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch, architecture: str, name: str):
    """Whether or not a loss couples tokens; Gemma 2's head is its embedding too, and caps its logits."""
    model, samples = tiny_model(architecture), some_samples()
    assert model.config.tie_word_embeddings is (architecture == "gemma2")
    expected = naive_gradient(model, samples, name)
    chunks_of(monkeypatch, 7)
    for budget in (30, 1000):
        assert_same(gradient(model, samples, Packing(1, budget, "packed"), name), expected)


def test_a_loss_that_couples_tokens_must_not_be_cut(monkeypatch: pytest.MonkeyPatch):
    """The tests above would see it."""
    model, samples, packing = tiny_model("qwen3"), some_samples(), Packing(1, 1000, "packed")
    expected = naive_gradient(model, samples, "gspo")
    chunks_of(monkeypatch, 7)
    trainer = trainer_of(model, packing, couples_tokens=False)
    forward_backward(trainer, make_minibatch(samples, packing, row("gspo"), 0), loss_of("gspo"))
    with pytest.raises(AssertionError):
        assert_same(gradient_of(model), expected, tolerance=0.01)


def test_chunks_of_the_head_do_not_change_metrics_or_records(monkeypatch: pytest.MonkeyPatch):
    model, packing, seen = tiny_model("qwen3"), Packing(1, 1000, "rows"), []
    for size in (7, 1000):
        chunks_of(monkeypatch, size)
        samples = some_samples()
        trainer = trainer_of(model, packing, couples_tokens=False)
        metrics = forward_backward(trainer, make_minibatch(samples, packing, ROWS["grpo"], 0), GRPO)
        seen.append((metrics, [x for s in samples for x in (*s.current_logprobs, *s.ratios, *s.clipped)]))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-4)
    assert seen[0][1] == pytest.approx(seen[1][1], rel=1e-4, abs=1e-6)


def test_an_update_has_the_same_bits_when_it_is_made_again(monkeypatch: pytest.MonkeyPatch):
    chunks_of(monkeypatch, 7)
    model, samples = tiny_model("gemma2"), some_samples()
    first, second = (gradient(model, samples, Packing(1, 30, "rows")) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("frozen", ["head", "body"])
def test_what_is_frozen_has_no_gradient_and_the_rest_has_its_own(frozen: str):
    model, samples = tiny_model("qwen3"), some_samples()
    expected = naive_gradient(model, samples, "cispo")
    getattr(model, frozen).requires_grad_(False)
    actual = gradient(model, samples, Packing(1, 30, "rows"))
    assert actual.keys() == {name for name in expected if name.startswith("lm_head.") is (frozen == "body")}
    assert_same(actual, {name: expected[name] for name in actual})


def test_a_bf16_model_collects_fp32_gradients_over_micro_batches():
    """They are near the FP32 model's; one micro-batch or six differ by the rounding of activations only."""
    samples = some_samples()
    exact = tiny_model("qwen3", scale=1.0)
    model = copy.deepcopy(exact)
    model.model.bfloat16()
    model = PolicyModel(model.model)
    expected = naive_gradient(exact, samples, "cispo")
    for budget in (1, 1000):
        trainer = trainer_of(model, packing=(packing := Packing(1, budget, "rows")))
        forward_backward(trainer, make_minibatch(samples, packing, ROWS["cispo"], 0))
        assert all(p.grad is None for p in trainer.optimizer.params)
        collected = [master.grad for master in trainer.optimizer.masters]
        assert all(g is not None and g.dtype == torch.float32 for g in collected)
        assert_same(dict(zip(expected, collected, strict=True)), expected, tolerance=0.1)


def test_the_gradient_of_a_bf16_head_is_never_rounded(monkeypatch: pytest.MonkeyPatch):
    """T3: it is added to the master's in FP32; rounded to BF16 chunk by chunk, it would lose what many chunks add."""
    model, samples, found = tiny_model("qwen3", torch.bfloat16), some_samples(), []
    for size in (1, 1000):
        chunks_of(monkeypatch, size)
        trainer = trainer_of(model, packing=(packing := Packing(1, 30, "rows")), couples_tokens=False)
        forward_backward(trainer, make_minibatch(samples, packing, ROWS["cispo"], 0))
        sum_ = trainer.optimizer.gradient_of(model.head.weight)
        assert sum_ is not None
        found.append(sum_)
    one, whole = found
    assert float((one - whole).abs().max()) <= 1e-5 * float(whole.abs().max())
    assert float((whole - whole.bfloat16().float()).abs().max()) > 1e-3 * float(whole.abs().max())


# what is recorded


def test_samples_hold_what_their_update_saw():
    model, samples = tiny_model("qwen3"), some_samples()
    packing = Packing(2, 30, "rows")
    trainer = trainer_of(model, packing)
    for minibatch in pack(samples, packing, ROWS["grpo"]):
        forward_backward(trainer, minibatch, GRPO)
    assert [s.update for s in samples] == [0, 0, 0, 1, 1, 1]
    for sample in samples:
        assert len(sample.current_logprobs) == len(sample.ratios) == len(sample.clipped) == len(sample)
        expected = [0.0, *naive_logprobs(model, sample).tolist()]
        for t, weight in enumerate(sample.loss_weights):
            if weight:
                ratio, advantage = math.exp(expected[t] - sample.old_logprobs[t]), sample.advantages[t]
                assert sample.current_logprobs[t] == pytest.approx(expected[t], abs=1e-4)
                assert sample.ratios[t] == pytest.approx(ratio, rel=1e-3)
                assert sample.clipped[t] is ((advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8))
            else:
                assert (sample.current_logprobs[t], sample.ratios[t], sample.clipped[t]) == (0.0, 1.0, False)


def test_metrics_are_over_all_micro_batches():
    model, samples = tiny_model("qwen3"), some_samples()
    metrics = forward_backward(
        trainer_of(model), make_minibatch(samples, Packing(1, 30, "rows"), ROWS["grpo"], 0), GRPO
    )
    entropies, losses, count, clipped = [], [], 0, 0
    for sample in samples:
        logits = model.model(input_ids=torch.tensor([sample.token_ids])).logits[0, :-1].double() / sample.temperature
        logp = torch.log_softmax(logits.detach(), -1)
        own = [t for t, weight in enumerate(sample.loss_weights) if weight]
        entropies += [float(-(logp[t - 1].exp() * logp[t - 1]).sum()) for t in own]
        terms = [sample.ratios[t] * sample.advantages[t] for t in own]
        bounded = [min(max(sample.ratios[t], 0.8), 1.2) * sample.advantages[t] for t in own]
        losses.append(-sum(map(min, terms, bounded)) / len(own))
        clipped += sum(b < a for a, b in zip(terms, bounded, strict=True))
        count += len(own)
    assert metrics["train/entropy"] == pytest.approx(sum(entropies) / count, rel=1e-4)
    assert metrics["train/loss"] == metrics["train/pg_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert metrics["train/pg_clipfrac"] == pytest.approx(clipped / count)


# old log-probs


@each_layout
def test_recomputed_logprobs_are_those_of_the_current_weights(layout: Layout):
    """At each sample's own temperature (Z19), over its full length."""
    model, samples = tiny_model("qwen3"), some_samples()
    asyncio.run(trainer_of(model, Packing(1, 30, layout)).forward(samples, "old_logprobs"))
    for sample in samples:
        expected = [0.0, *naive_logprobs(model, sample).tolist()]
        expected = [e if w else 0.0 for e, w in zip(expected, sample.loss_weights, strict=True)]
        assert sample.old_logprobs == pytest.approx(expected, abs=1e-4)


def test_recomputing_keeps_nothing_for_a_backward():
    """It would cost the memory of a training step."""
    trainer, kept = trainer_of(tiny_model("qwen3")), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda nothing: nothing):
        asyncio.run(trainer.forward(some_samples(), "old_logprobs"))
    assert kept == []


def test_the_first_update_is_on_policy_and_the_second_is_not():
    """R2: ratio 1 at the first update, against log-probs from a forward of their own; after it the weights have moved."""
    model, samples = tiny_model("qwen3"), some_samples()
    packing = Packing(2, 30, "rows")
    trainer = trainer_of(model, packing, learning_rate=0.01)
    asyncio.run(trainer.forward(samples, "old_logprobs"))
    seen = []
    for minibatch in pack(samples, packing, ROWS["grpo"]):
        seen.append(forward_backward(trainer, minibatch, GRPO))
        asyncio.run(trainer.optim_step())
    assert abs(seen[0]["train/ppo_kl"]) < 1e-5
    assert seen[0]["train/pg_clipfrac"] == 0.0
    assert seen[0]["train/ratio/max"] == pytest.approx(1.0, abs=1e-4)
    assert abs(seen[1]["train/ppo_kl"]) > 1e-3
    assert seen[1]["train/ratio/max"] > 1.01


# refusals


@pytest.mark.parametrize("budget", [1, 1000])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_with_the_samples_name(
    monkeypatch: pytest.MonkeyPatch, bad: float, budget: int
):
    """And no gradient of the update is left, neither of micro-batches before it nor of chunks."""
    chunks_of(monkeypatch, 7)
    model, samples = tiny_model("qwen3"), some_samples()
    samples[2].advantages = [bad] * len(samples[2])
    minibatch = make_minibatch(samples, Packing(1, budget, "packed"), ROWS["cispo"], 3)
    name = r"p#1\.0" if budget == 1 else r"p#0\.1, "
    with pytest.raises(NonFiniteError, match=rf"loss is {bad} at update 3 of the step.*\({name}.*refused"):
        forward_backward(trainer_of(model, couples_tokens=False), minibatch)
    assert gradient_of(model) == {}


# updates


def test_updates_make_rewarded_tokens_likelier_and_punished_ones_rarer():
    """The sign of it all: CISPO, fresh samples, ten updates."""
    model, samples = tiny_model("qwen3"), some_samples([10, 10])
    for sample, advantage in zip(samples, (1.0, -1.0), strict=True):
        sample.temperature, sample.advantages = 1.0, [advantage] * 10
    trainer = trainer_of(model)
    asyncio.run(trainer.forward(samples, "old_logprobs"))
    before = [sum(s.old_logprobs) for s in samples]
    for i in range(10):
        forward_backward(trainer, make_minibatch(samples, trainer.packing, ROWS["cispo"], i))
        metrics = asyncio.run(trainer.optim_step()).values_by_name()
        assert metrics["train/grad_norm"] > 0
    asyncio.run(trainer.forward(samples, "old_logprobs"))
    after = [sum(s.old_logprobs) for s in samples]
    assert after[0] > before[0] + 1
    assert after[1] < before[1] - 1


def test_weights_are_a_handle_to_the_live_model():
    model = tiny_model("qwen3")
    trainer = trainer_of(model)
    assert trainer.weights().model is model


def test_a_saved_folder_loads_in_transformers_with_the_trained_weights(tmp_path: Path):

    tokenizer = AutoTokenizer.from_pretrained(make_char_tokenizer(tmp_path / "tokenizer", "0123456789"))
    model, samples = tiny_model("qwen3"), some_samples()
    trainer = trainer_of(model, tokenizer=tokenizer)
    forward_backward(trainer, make_minibatch(samples, trainer.packing, ROWS["cispo"], 0))
    asyncio.run(trainer.optim_step())
    trainer.snapshot()(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, parameter in model.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("42").input_ids == tokenizer("42").input_ids


def test_an_update_makes_older_handles_to_the_weights_stale_and_waits_while_they_are_sent():
    """An engine that begins in between must get what was published, or be told that it is gone."""
    packing = Packing(1, 1000, "packed")
    trainer = trainer_of(tiny_model("qwen3"), packing)
    handle, address = trainer.weights(), Address("127.0.0.1", 9, "engine", 0, 1, (), 1.0)
    forward_backward(trainer, make_minibatch(some_samples(), packing, row("cispo"), 0))

    async def update() -> None:
        async with handle.updates.lock.read():
            stepping = asyncio.create_task(trainer.optim_step())
            await asyncio.sleep(0.01)
            assert not stepping.done()
            assert await trainer.fingerprint() == before
        await stepping
        with pytest.raises(WeightsMoved):
            await handle.broadcast(address, 0)

    before = asyncio.run(trainer.fingerprint())
    asyncio.run(update())
    assert asyncio.run(trainer.fingerprint()) != before
