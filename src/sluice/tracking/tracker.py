"""Trackers that write the run folder, and that tell several others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from sluice.interfaces import Tracker
from sluice.tracking.ledger import Pieces, write_step
from sluice.tracking.rundir import RunDir, append_line
from sluice.types import Group, Sample


class FileTracker:
    """Writes metrics.jsonl, events.jsonl and the ledger; what a call wrote is on disk when it returns."""

    def __init__(self, rundir: RunDir, pieces: Pieces) -> None:
        self.rundir = rundir
        self.pieces = pieces

    def log(self, step: int, metrics: dict[str, float]) -> None:
        append_line(self.rundir.metrics, {"step": step, **metrics})

    def log_groups(
        self, step: int, groups: Sequence[Group], samples: Sequence[Sample], fingerprint: str | None = None
    ) -> None:
        write_step(self.rundir, step, groups, samples, self.pieces, fingerprint)

    def event(self, kind: str, message: str, **details: Any) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        append_line(self.rundir.events, {"time": now, "kind": kind, "message": message, "details": details})

    def close(self) -> None:
        """Nothing is held open."""


class Trackers(list[Tracker]):
    """Several trackers as one, told in order."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for tracker in self:
            tracker.log(step, metrics)

    def log_groups(
        self, step: int, groups: Sequence[Group], samples: Sequence[Sample], fingerprint: str | None = None
    ) -> None:
        for tracker in self:
            tracker.log_groups(step, groups, samples, fingerprint)

    def event(self, kind: str, message: str, **details: Any) -> None:
        for tracker in self:
            tracker.event(kind, message, **details)

    def close(self) -> None:
        """Closes all of them, also when one raises."""
        with ExitStack() as stack:
            for tracker in reversed(self):
                stack.callback(tracker.close)
