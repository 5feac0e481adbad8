"""Trackers that write the run folder, and that tell several others."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from sluice.interfaces import Tracker
from sluice.tracking.ledger import Pieces, write_step
from sluice.tracking.rundir import RunDir, append_line, is_disk_full, patiently
from sluice.types import Group, Sample


class FileTracker:
    """Writes metrics.jsonl, events.jsonl and the ledger; what a call wrote is on disk when it returns."""

    def __init__(
        self, rundir: RunDir, pieces: Pieces, disk_wait_s: float = 0.0, tell: Callable[[str], None] = print
    ) -> None:
        """On a full disk it says so to `tell` and waits for room, `disk_wait_s` at most."""
        self.rundir = rundir
        self.pieces = pieces
        self._disk_wait_s, self._tell = disk_wait_s, tell
        self._events: list[dict[str, Any]] = []  # that found no room
        self._telling = threading.Lock()  # watchdog and checkpoints speak from threads of their own

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._write(lambda: append_line(self.rundir.metrics, {"step": step, **metrics}), self.rundir.metrics)

    def log_groups(
        self, step: int, groups: Sequence[Group], samples: Sequence[Sample], fingerprint: str | None = None
    ) -> None:
        def write() -> None:
            write_step(self.rundir, step, groups, samples, self.pieces, fingerprint)

        self._write(write, f"step {step} of the ledger")

    def event(self, kind: str, message: str, **details: Any) -> None:
        """Never waits: one that finds no room on the disk is written later."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._events.append({"time": now, "kind": kind, "message": message, "details": details})
        self._write_events()

    def close(self) -> None:
        self._write_events()

    def _write_events(self) -> None:
        try:
            with self._telling:
                while self._events:
                    append_line(self.rundir.events, self._events[0])
                    del self._events[0]
        except OSError as error:
            if not is_disk_full(error):  # of a full disk the console tells
                print(f"{self.rundir.events} cannot be written: {error.strerror}", file=sys.stderr)

    def _write(self, write: Callable[[], object], what: object) -> None:
        patiently(write, str(what), self._disk_wait_s, self._tell)


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
