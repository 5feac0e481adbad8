"""What the loop and the workers of a run hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from sluice.interfaces import Engine, Environment, Tracker, Trainer
from sluice.tracking.metrics import Metrics, Sum
from sluice.tracking.rundir import RunDir
from sluice.types import Group, Sampling


class Timer:
    """Seconds spent per phase of a step, as `perf/PHASE_s`; a phase inside another counts for itself only."""

    def __init__(self) -> None:
        self._metrics = Metrics()
        self._inner_s = 0.0
        """What phases inside the present one have taken."""

    @contextmanager
    def __call__(self, phase: str) -> Generator[None]:
        start, before, self._inner_s = time.perf_counter(), self._inner_s, 0.0
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._metrics += Metrics({f"perf/{phase}_s": Sum(seconds - self._inner_s)})
            self._inner_s = before + seconds

    def drain(self) -> Metrics:
        metrics, self._metrics = self._metrics, Metrics()
        return metrics


@dataclass
class Run:
    """Built by `launch`; sync, async and distributed runs differ in what is put here, never in the loop."""

    engine: Engine
    trainer: Trainer
    environment: Environment
    rubric: Any
    """Scores a trajectory: `await rubric.score(prompt, trajectory)`."""
    chat: Any
    """Messages to ids, and ids to text."""
    buffer: Any
    prompts: Any
    """`prompts[ticket]` gives the prompt of a ticket; there is no last one."""
    algorithm: Any
    packing: Any
    sampling: Sampling
    tracker: Tracker
    rundir: RunDir
    checks: Any
    """The invariants that hold while it runs: see `sluice.checks`."""

    seed: int
    num_steps: int
    groups_per_step: int
    group_size: int
    max_staleness: int
    old_logprobs: Literal["engine", "recomputed"]
    pretrain_steps: int
    """Steps at the start in which only the critic learns."""
    update_reference_every: int | None
    """Steps after which the policy becomes the reference; None: never."""
    long_prompts: Literal["error", "skip"]
    group_filter: Callable[[Group], bool] | None
    attempt_timeout_s: float
    stop_at_reward: float | None
    checkpoints: Any
    """`await checkpoints.save(run, metrics)` copies the state and writes it while the run goes on."""
    checkpoint_every: int | None
    """Steps between checkpoints, besides the one at the end."""

    step: int = 0
    """Finished steps, which is also the version of the weights that the engine holds."""
    reward_reached: bool = False
    """Whether `stop_at_reward` has made the present step the last."""
    fingerprint: str | None = None
    """Of these weights; None without any."""
    timer: Timer = field(default_factory=Timer)
