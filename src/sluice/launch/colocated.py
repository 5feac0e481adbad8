"""Trainer and engines on one GPU, in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sluice.errors import ConfigError
from sluice.interfaces import Layout, Trainer, TrainerOutput
from sluice.launch.models import give_back_unused_memory
from sluice.tracking.metrics import Metrics
from sluice.types import Sample

if TYPE_CHECKING:
    from sluice.engines.server import ServerEngine


class ColocatedTrainer:
    """A trainer that sends the engines to sleep before it computes; they wake with the next weights.

    The rest is the trainer's own.
    """

    def __init__(self, trainer: Trainer, engines: Sequence[ServerEngine], *, on_gpu: bool) -> None:
        """Raises ConfigError for a trainer that is not `on_gpu`."""
        if not on_gpu:
            raise ConfigError(
                "engine.sleep=true has no effect with a trainer on the CPU: there is no GPU to share; leave it out"
            )
        self._trainer, self._engines = trainer, engines

    async def forward(self, samples: Sequence[Sample], output: TrainerOutput, layout: Layout | None = None) -> None:
        await self._alone()
        await self._trainer.forward(samples, output, layout)

    async def forward_backward(self, minibatch: Any, loss: Callable[..., Any] | None) -> Metrics:
        await self._alone()
        return await self._trainer.forward_backward(minibatch, loss)

    async def _alone(self) -> None:
        await asyncio.gather(*(engine.sleep() for engine in self._engines))

    def weights(self) -> Any:
        """What the trainer's allocator keeps of memory that it does not use goes back first: the engine will want it."""
        give_back_unused_memory()
        return self._trainer.weights()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)
