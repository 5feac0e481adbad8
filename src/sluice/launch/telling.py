"""What tells of a run while it lasts: its trackers, and its watchdog."""

from __future__ import annotations

from sluice.config import SftConfig, TrainConfig
from sluice.data.chat import Chat
from sluice.environments.processes import EnvironmentProcesses
from sluice.run import Run
from sluice.tracking.console import ConsoleTracker
from sluice.tracking.rundir import RunDir
from sluice.tracking.tracker import FileTracker, Trackers
from sluice.watchdog import Watchdog


def trackers(
    config: TrainConfig | SftConfig, rundir: RunDir, chat: Chat, num_steps: int, rewards: list[str] | None = None
) -> Trackers:
    """Files and console; `rewards` are labels of parts that get a column there."""
    tracker = Trackers()

    def tell(message: str) -> None:
        tracker.event("disk_full", message)

    parts = [f"rollout/reward/{label}" for label in rewards or ()]
    tracker += [
        ConsoleTracker(num_steps, extra=parts),  # first: it can tell of a disk that hangs
        FileTracker(rundir, chat.pieces, config.run.disk_wait_s, tell),
    ]
    return tracker


def watchdog(run: Run, config: TrainConfig) -> Watchdog:
    sections = {
        "run": lambda: f"{run.step} of {run.num_steps} steps are finished",
        "buffer": run.buffer.status,
        "engine": lambda: f"{run.engine.status()}{_logs_of_the_engine(run.rundir)}",
        "trainer": run.trainer.status,
        "reward processes": run.rubric.status,
    }
    if isinstance(run.environment, EnvironmentProcesses):
        sections["environment processes"] = run.environment.status
    return Watchdog(run.waits, run.tracker, run.rundir, config.watchdog.warn_after_s, sections)


def _logs_of_the_engine(rundir: RunDir) -> str:
    """Where it has written what it does."""
    logs = [str(log) for log in sorted(rundir.path.glob("engine*.log")) if log.stat().st_size]
    return f"; see {', '.join(logs)}" if logs else ""
