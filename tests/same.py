"""Whether two runs are the same to the last bit: weights, the trainer's whole state, ledger, metrics, consumed prompts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from small_runs import ledger_of, metrics_of, without_timings


def same(one: Any, other: Any) -> bool:
    """Trees of tensors and plain values; nan is nan."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


def state_of(checkpoint: Path) -> Any:
    return torch.load(checkpoint / "trainer_state.pt", weights_only=True)


def assert_same_runs(one: Path, other: Path, num_steps: int) -> None:
    last = f"checkpoints/step-{num_steps:06d}"
    assert (one / last / "model.safetensors").read_bytes() == (other / last / "model.safetensors").read_bytes()
    assert same(state_of(one / last), state_of(other / last))
    assert same(without_timings(metrics_of(one)), without_timings(metrics_of(other)))
    for step in range(1, num_steps + 1):
        assert same(ledger_of(one, step), ledger_of(other, step)), f"step {step}"
    assert consumed_prompts(one, num_steps) == consumed_prompts(other, num_steps)


def consumed_prompts(run: Path, num_steps: int) -> list[tuple[int, str, bool]]:
    """Ticket, prompt and whether it was trained, in the order of tickets; every ticket once."""
    seen = {
        row["group"]: (row["group"], row["prompt_id"], row["trained"])
        for step in range(1, num_steps + 1)
        for row in ledger_of(run, step)
    }
    assert sorted(seen) == list(range(len(seen)))
    return [seen[ticket] for ticket in sorted(seen)]
