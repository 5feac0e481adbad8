"""Adapters over a sharded model learn what they learn over one that is in one process, and all others see merged weights."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from ranked import Setup, local_trainer, ranks, row, updated, weights_of
from safetensors.torch import load_file
from test_local_trainer import some_samples
from test_ranks import ADAMW, with_returns
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoModelForCausalLM

from models import tiny_model
from sluice.errors import ConfigError
from sluice.trainers.ranks import RankedTrainer

ADAPTERS: dict[str, Any] = {"rank": 4, "alpha": 16.0, "targets": (), "seed": 1}
SETUP = Setup(adapters=ADAPTERS)
ADAPTER = "adapter/adapter_model.safetensors"


async def saved(trainer: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The adapter alone, of a folder that a trainer has written."""
    await trainer.weights().save(str(folder))
    return load_file(folder / ADAPTER)


async def assert_same_updates(trainer: RankedTrainer, setup: Setup, folder: Path, tolerance: float = 1e-6) -> None:
    """Three, since B begins as 0, and A without a gradient: metrics, what each token saw, adapters, and what is published."""
    local = local_trainer(setup)
    assert await trainer.fingerprint() == await local.fingerprint()
    before = dict(await weights_of(trainer, setup))
    for layout, name, seed in (("packed", "cispo", 0), ("rows", "gspo", 1), ("packed", "gspo", 2)):
        samples, own = some_samples(seed=seed), some_samples(seed=seed)
        local.couples_tokens = row(name).couples_tokens
        expected = await updated(local, own, setup, layout, row(name))
        told = await updated(trainer, samples, setup, layout, row(name))
        assert told == {n: pytest.approx(v, rel=1e3 * tolerance, abs=tolerance) for n, v in expected.items()}
        assert told["train/grad_norm"] > 0
        for one, other in zip(samples, own, strict=True):
            assert one.current_logprobs == pytest.approx(other.current_logprobs, abs=100 * tolerance)
    published = dict(await weights_of(trainer, setup))
    for name, weight in local.model.named_weights():
        torch.testing.assert_close(published[name], weight.detach(), rtol=0, atol=10 * tolerance)
    moved = {name for name, weight in before.items() if not torch.equal(weight, published[name])}
    assert moved
    assert all(name.endswith("_proj.weight") for name in moved), "others than those with adapters are not trained"
    adapter, wanted = await saved(trainer, folder / "ranks"), await saved(local, folder / "local")
    assert adapter.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(adapter[name], wanted[name], rtol=0, atol=tolerance)


# of peft's own, when it looks at a model
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_two_ranks_learn_what_one_process_learns_and_write_what_it_writes(tmp_path: Path):
    async def whole() -> None:
        setup = replace(SETUP, reference=True)
        async with ranks(setup, 2) as trainer:
            await assert_same_updates(trainer, setup, tmp_path)
            samples = some_samples()
            await trainer.update_reference()
            await trainer.forward(samples, "old_logprobs")
            await trainer.forward(samples, "ref_logprobs")
            for sample in samples:
                assert sample.ref_logprobs == pytest.approx(sample.old_logprobs, abs=1e-5)
                assert any(sample.ref_logprobs)

    asyncio.run(whole())
    tiny_model("qwen3").model.save_pretrained(tmp_path / "base")
    ids = torch.arange(3, 20)[None]
    logits: list[torch.Tensor] = []
    for writer in ("local", "ranks"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / writer)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        over_base: Any = PeftModel.from_pretrained(base, str(tmp_path / writer / "adapter"))
        with torch.no_grad():
            logits += [model(input_ids=ids).logits for model in (merged, over_base)]
    for each in logits[1:]:
        torch.testing.assert_close(each, logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.proof
@pytest.mark.parametrize(
    ("architecture", "num", "tensor", "context"),
    [
        ("qwen3", 1, 1, 1),
        ("qwen3", 4, 1, 1),
        ("qwen3", 2, 2, 1),
        ("qwen3", 4, 2, 1),
        ("qwen3", 2, 1, 2),
        ("qwen3_all_heads", 4, 2, 2),
        ("qwen2", 2, 2, 1),
        ("llama", 4, 2, 1),
        ("gemma2", 2, 1, 1),
    ],
)
def test_any_division_has_the_same_adapters(architecture: str, num: int, tensor: int, context: int, tmp_path: Path):
    """Of models with biases, tied and untied heads, and soft caps."""

    async def whole() -> None:
        setup = replace(SETUP, architecture=architecture)
        async with ranks(setup, num, tensor, context) as trainer:
            await assert_same_updates(trainer, setup, tmp_path)

    asyncio.run(whole())


@pytest.mark.proof
@pytest.mark.timeout(900)  # of compiling
@pytest.mark.parametrize(
    ("num", "words", "tolerance"),
    [
        # more ranks than A has rows
        (4, {"adapters": {**ADAPTERS, "rank": 2, "targets": ("q_proj", "down_proj")}}, 1e-6),
        (2, {"recompute": True}, 1e-6),
        (2, {"compile": True}, 1e-5),
        # gradients are rounded on each rank; the first fingerprints, of BF16 weights, are equal
        (2, {"dtype": torch.bfloat16}, 2e-2),
    ],
    ids=["some layers", "recomputed", "compiled", "bf16"],
)
def test_any_setting_has_the_same_adapters(num: int, words: dict[str, Any], tolerance: float, tmp_path: Path):
    async def whole() -> None:
        setup = replace(SETUP, **words)
        async with ranks(setup, num) as trainer:
            await assert_same_updates(trainer, setup, tmp_path, tolerance)

    asyncio.run(whole())


async def checkpointed(setup: Setup, num: int, folder: Path) -> tuple[dict[str, Any], list[list[float]]]:
    """The state that two updates leave in a checkpoint, and what a third one, taken before it is written, makes of the log-probs."""
    async with ranks(setup, num) as trainer:
        for seed in (0, 1):
            await updated(trainer, with_returns(some_samples(seed=seed)), setup, "packed", setup.algorithm)
        write = trainer.snapshot()
        end = await third(trainer, setup)
        return await asyncio.to_thread(write, str(folder)), end


async def third(trainer: RankedTrainer, setup: Setup) -> list[list[float]]:
    await updated(trainer, with_returns(some_samples(seed=2)), setup, "packed", setup.algorithm)
    samples = some_samples()
    await trainer.forward(samples, "old_logprobs")
    return [sample.old_logprobs for sample in samples]


def test_a_checkpoint_holds_adapters_and_goes_on_with_another_number_of_ranks(tmp_path: Path):
    async def whole() -> None:
        setup = replace(SETUP, optimizer=ADAMW)
        state, end = await checkpointed(setup, 2, tmp_path)
        async with ranks(setup, 1) as trainer:
            trainer.restore(str(tmp_path), state)
            for one, other in zip(await third(trainer, setup), end, strict=True):
                assert one == pytest.approx(other, abs=2e-5)
        held = FileSystemReader(tmp_path / "shards").read_metadata().state_dict_metadata
        assert len(held) == 2 * 2 * 7 * 3, "two factors of seven matrices in two layers, each with its moments"
        assert all(".lora_" in name for name in held)
        AutoModelForCausalLM.from_pretrained(tmp_path)

    asyncio.run(whole())


@pytest.mark.proof
def test_a_checkpoint_goes_on_to_the_last_bit_but_not_over_another_model(tmp_path: Path):
    """With a critic's head on the states of a policy that has adapters."""

    async def whole() -> None:
        setup = replace(SETUP, optimizer=ADAMW, algorithm=row("ppo"), critic="head")
        state, end = await checkpointed(setup, 2, tmp_path)
        async with ranks(setup, 2) as trainer:
            trainer.restore(str(tmp_path), state)
            assert await third(trainer, setup) == end
        async with ranks(replace(setup, dtype=torch.bfloat16), 2) as trainer:
            trainer.restore(str(tmp_path), state)
            with pytest.raises(ConfigError, match=r"model\.path were changed"):
                await trainer.fingerprint()

    asyncio.run(whole())
