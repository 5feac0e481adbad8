"""What the loop and the workers of a run hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from sluice.interfaces import Engine, Environment, Tracker, Trainer
from sluice.tracking.metrics import Metrics, Sum
from sluice.tracking.rundir import RunDir
from sluice.types import Group, Sampling
from sluice.waits import Wait, Waits


class Timer:
    """Seconds spent per phase of a step, as `perf/PHASE_s`; a phase inside another counts for itself only.

    While it lasts, a phase is on the list of what is waited for.
    """

    def __init__(self, waits: Waits, name: Callable[[], str]) -> None:
        """`name` says whose phase it is, as it begins."""
        self._waits, self._name = waits, name
        self._metrics = Metrics()
        self._inner_s = 0.0
        """What phases inside the present one have taken."""
        self._wait: Wait | None = None

    @contextmanager
    def __call__(self, phase: str, *, queued: bool = False) -> Generator[Wait]:
        start, before, self._inner_s = time.perf_counter(), self._inner_s, 0.0
        outer = self._wait
        if outer:
            outer.at(outer.stage.name, queued=True)  # it waits for the one inside
        try:
            with self._waits(self._name(), phase, queued=queued) as self._wait:
                yield self._wait
        finally:
            self._wait = outer
            if outer:
                outer.at(outer.stage.name)
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
    """Scores a trajectory: `await rubric.score(prompt, trajectory, wait)`, and tells the wait what it waits for."""
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
    engine_retries: int
    """Times that a failed generation is tried again, with the same seed."""
    vocab_size: int | None
    """Of the model; token ids from it on are foreign. None without a model."""
    max_length: int | None
    """Positions of the model."""
    routing: tuple[int, int] | None
    """With routing replay, of the model: experts that a token takes in all layers, and those that a layer has."""
    stop_at_reward: float | None
    checkpoints: Any
    """`await checkpoints.after_step(run, metrics)` copies the state when it is time, and writes it while the run goes on."""
    meters: Sequence[Callable[[], Metrics]] = ()
    """Each gives, once a step, what it has measured since it was asked last."""

    step: int = 0
    """Finished steps, which is also the version of the weights that the engine holds."""
    reward_reached: bool = False
    """Whether `stop_at_reward` has made the present step the last."""
    fingerprint: str | None = None
    """Of these weights; None without any."""
    published_bytes: int = 0
    """Moved for the last publication."""
    engine_failure: str = ""
    """The failure of the engine that was told last."""
    waits: Waits = field(default_factory=Waits)
    timer: Timer = field(init=False)

    def __post_init__(self) -> None:
        self.timer = Timer(self.waits, lambda: f"the loop after step {self.step}")
