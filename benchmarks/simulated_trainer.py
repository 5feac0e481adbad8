"""A trainer that only takes time, in a `VirtualTimeLoop`. What its tokens are says `simulated_engine.py`."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sluice.data.batch import Minibatch
from sluice.tracking.metrics import Metrics
from sluice.trainers.dry import DryTrainer


@dataclass(frozen=True)
class TrainerRates:
    """What training takes, in seconds of one of `ranks` that share the samples of an update."""

    token_s: float
    squared_token_s: float = 0.0
    """Of attention: per squared token of a sample."""
    update_s: float = 0.0
    """Of an update, whatever it trains on."""
    sample_s: float = 0.0
    ranks: int = 1

    def seconds(self, lengths: Sequence[float]) -> float:
        """Of one update. A sample is never cut, so no rank has less to do than the longest sample."""
        each = [self.sample_s + n * self.token_s + n * n * self.squared_token_s for n in lengths]
        return self.update_s + max(math.fsum(each) / self.ranks, max(each, default=0.0))


@dataclass(frozen=True)
class TrainerFailures:
    """One rank that fails takes all of them down, and what was done since the last checkpoint is done again."""

    between_s: float
    """Mean time between two failures of any rank."""
    restart_s: float
    checkpoint_every_steps: int


class SimulatedTrainer(DryTrainer):
    def __init__(
        self,
        rates: TrainerRates,
        failures: TrainerFailures | None,
        *,
        shared_tokens: float,
        updates_per_batch: int,
        micro_batches: int | None,
        seed: int,
    ) -> None:
        """`shared_tokens` of each sample are computed for another one of its group already. `micro_batches`: it computes in the
        process of the loop, which runs only between so many parts of an update; None: elsewhere."""
        super().__init__()
        self.rates, self.failures = rates, failures
        self.shared_tokens = shared_tokens
        self.updates_per_batch = updates_per_batch
        self.micro_batches = micro_batches
        self.loop: Any = asyncio.get_running_loop()
        self.busy_s = 0.0
        self.num_failures = 0
        self._num_updates = 0
        self._checkpoint_at = 0.0
        self._random = random.Random(f"trainer's failures {seed}")
        self._next_failure = self._after(0.0)

    async def forward_backward(self, minibatch: Minibatch, loss: Callable[..., Any] | None) -> Metrics:
        samples = [sample for micro_batch in minibatch.micro_batches for sample in micro_batch.samples]
        seconds = self.rates.seconds([sum(sample.token_ids) - self.shared_tokens for sample in samples])
        self.busy_s += seconds
        parts = self.micro_batches
        if parts is None:
            await self._worked(seconds)
            return Metrics()
        for _ in range(parts):
            self.loop.block(seconds / parts)
            for _ in range(10):  # as sluice.trainers.local lets others work
                await asyncio.sleep(0)
        return Metrics()

    async def optim_step(self) -> Metrics:
        self._num_updates += 1
        failures = self.failures
        if failures and self._num_updates % (failures.checkpoint_every_steps * self.updates_per_batch) == 0:
            self._checkpoint_at = self.loop.time()
        return Metrics()

    async def _worked(self, seconds: float) -> None:
        """So many seconds, and what failures cost beside them."""
        failures = self.failures
        while failures and self._next_failure < self.loop.time() + seconds:
            self.num_failures += 1
            done_again = min(self._next_failure, self.loop.time()) - self._checkpoint_at
            up_at = self._next_failure + failures.restart_s
            await asyncio.sleep(max(0.0, up_at - self.loop.time()) + done_again)
            self._checkpoint_at = self.loop.time() - done_again
            self._next_failure = self._after(self.loop.time())
        await asyncio.sleep(seconds)

    def _after(self, now: float) -> float:
        failures = self.failures
        return now + self._random.expovariate(1 / failures.between_s) if failures else math.inf
