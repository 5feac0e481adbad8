"""A trainer that changes nothing: for trying data, rewards and the loop without a model, and for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sluice.data.batch import Minibatch
from sluice.interfaces import Layout, TrainerOutput
from sluice.tracking.metrics import Metrics, Sum
from sluice.types import Sample
from sluice.weights.in_process import InProcessWeights


class DryTrainer:
    """Takes every batch, and notes the samples of each update in `updates`, by name."""

    def __init__(self) -> None:
        self.updates: list[list[str]] = []

    async def forward(self, samples: Sequence[Sample], output: TrainerOutput, layout: Layout | None = None) -> None:
        raise TypeError(f"a dry trainer has no model to compute {output} with")

    async def forward_backward(self, minibatch: Minibatch, loss: Callable[..., Any] | None) -> Metrics:
        samples = [sample for micro_batch in minibatch.micro_batches for sample in micro_batch.samples]
        self.updates.append([sample.name for sample in samples])
        return Metrics({"train/loss_tokens": Sum(minibatch.num_loss_tokens)})

    async def optim_step(self) -> Metrics:
        return Metrics()

    async def update_reference(self) -> None:
        raise TypeError("a dry trainer has no reference")

    def weights(self) -> InProcessWeights:
        return InProcessWeights(None)

    async def fingerprint(self) -> None:
        """There are no weights."""

    def snapshot(self) -> Callable[[str], dict[str, Any]]:
        """There are no weights; what was trained is the state."""
        updates = list(self.updates)
        return lambda folder: {"updates": updates}

    def restore(self, folder: str, state: dict[str, Any]) -> None:
        self.updates = list(state["updates"])

    def status(self) -> str:
        return "changes nothing"

    async def close(self) -> None:
        """There is nothing to end."""
