"""The sum of all parts of the reward, computed in processes with hard time limits. An error is never a score."""

from __future__ import annotations

import asyncio
import math
import pickle
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sluice.errors import ConfigError, RewardError, boundary
from sluice.processes import Launch, Process
from sluice.rewards.pool import PartError, PartTimeout, Worker, WorkerDied
from sluice.rewards.spec import RewardSpec, build
from sluice.types import Outcome, Prompt, Trajectory
from sluice.waits import Wait

TRIES = 3
"""Of a sample whose process dies: once while it was idle and once more may be the machine's doing, more is the sample's."""


@dataclass
class _Verdict:
    outcome: Outcome
    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict[str, float])
    error: str = ""


class Rubric:
    """Scores trajectories with several weighted rewards, `num_workers` at a time.

    What rewards print goes to the file `log`, or nowhere. Raises ConfigError for a reward that cannot work.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        num_workers: int,
        log: Path | None = None,
        launch: Callable[[int], Launch] = lambda index: Process,
    ):
        """`launch` says of each worker how its processes are started."""
        labels = [spec.label for spec in specs]
        if not labels or len(set(labels)) < len(labels):
            raise ConfigError(f"a rubric needs rewards, and each its own label; got {labels}")
        for spec in specs:
            build(spec)
        self._specs = tuple(specs)
        self._workers = [Worker(specs, log, launch(index)) for index in range(num_workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        # As many threads as processes, each waiting for one: a thread that runs always finds an idle process.
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="rubric")

    async def start(self) -> None:
        """Start all processes. Raises RewardError when one cannot, with what it said.

        Without it they start at the first samples, and failure to start is an error of those.
        """
        loop = asyncio.get_running_loop()
        starts = [loop.run_in_executor(self._threads, worker.start) for worker in self._workers]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            self.close()
            raise

    async def score(self, prompt: Prompt, trajectory: Trajectory, wait: Wait | None = None) -> None:
        """Fill the trajectory's `outcome`, and `reward` and `reward_parts` (before weighting) or `error`.

        Never raises for what a reward does. Takes at most the sum of the time limits, `TRIES` times where a process is
        killed from outside, once there is a free process. `wait` is told which part is computed.
        """
        wait = wait or Wait("scoring")
        wait.at("a free reward process", queued=True)
        verdict = await asyncio.get_running_loop().run_in_executor(self._threads, self._score, prompt, trajectory, wait)
        trajectory.outcome = verdict.outcome
        trajectory.reward = verdict.reward
        trajectory.reward_parts = verdict.parts
        trajectory.error = verdict.error

    def status(self) -> str:
        """What each process does at the moment, for people."""
        return "\n".join(worker.status() for worker in self._workers)

    def close(self) -> None:
        """Kill all processes; what is being scored gets no score."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _score(self, prompt: Prompt, trajectory: Trajectory, wait: Wait) -> _Verdict:
        worker = self._idle.get_nowait()
        try:
            with boundary(RewardError, "cannot be sent to a reward process"):
                sample = pickle.dumps((prompt, trajectory))
            for tries_left in reversed(range(TRIES)):
                try:
                    return self._weigh(worker.values(sample, wait))
                except WorkerDied:
                    if not tries_left:
                        raise
            raise AssertionError("the last try returns or raises")
        except PartError as error:
            outcome = "timeout" if isinstance(error, PartTimeout) else "error"
            return _Verdict(outcome, error=self._message(prompt, error, self._specs[error.index]))
        except Exception as error:
            return _Verdict("error", error=self._message(prompt, error))
        finally:
            self._idle.put(worker)
            wait.at("the event loop", queued=True)

    def _weigh(self, values: Sequence[float | dict[str, float]]) -> _Verdict:
        parts: dict[str, float] = {}
        reward = 0.0
        for spec, value in zip(self._specs, values):
            if isinstance(value, dict):
                parts |= {f"{spec.label}/{key}": part for key, part in value.items()}
            else:
                parts[spec.label] = value
            reward += spec.weight * (sum(value.values()) if isinstance(value, dict) else value)
        if not math.isfinite(reward):
            raise RewardError(f"the weighted sum of the parts {parts} is {reward}")
        return _Verdict("scored", reward, parts)

    @staticmethod
    def _message(prompt: Prompt, error: Exception, spec: RewardSpec | None = None) -> str:
        row = f" ({prompt.where})" if prompt.where else ""
        reward = f"reward {spec.label!r}, " if spec else ""
        tries = f", {TRIES} times" if isinstance(error, WorkerDied) else ""
        what = str(error) if isinstance(error, PartError | RewardError) else f"{type(error).__name__}: {error}"
        return f"{reward}prompt {prompt.id}{row}: {what}{tries}"
