"""What a run waits for at the moment: written by whatever waits, read by the watchdog from its own thread."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from dataclasses import dataclass
from typing import Any, NamedTuple


class Stage(NamedTuple):
    """One immutable value, so that another thread sees the old one or the new one and never half of each."""

    name: str
    """What is waited for: `engine`, `reward math`, `train` …"""
    place: str
    """Where on its way it is: `turn 1`, `update 2 of 4`; may be empty."""
    queued: bool
    """It waits for others on this list, as for a free reward process, and so is never what holds a run up."""
    since: float
    """time.monotonic()"""


class Wait:
    """One of the things that a run is doing, and the stage that it is in; as a context manager, on its list as long as the block.

    Belongs to whoever made it. Runs make hundreds in every step, so it does little.
    """

    __slots__ = ("_list", "_stage", "details", "name", "task")

    def __init__(
        self, name: str, details: str = "", stage: str = "beginning", queued: bool = False, waits: Waits | None = None
    ) -> None:
        self.name = name
        """`rollout 17.3`: ticket and attempt."""
        self.details = details
        """`prompt gsm8k-0412`"""
        self.task: asyncio.Task[Any] | None = None
        """Which asyncio task it belongs to; None in a thread without a loop."""
        self._list = waits
        self._stage = stage, "", queued, time.monotonic()

    def at(self, stage: str, place: str | None = None, *, queued: bool = False) -> None:
        """From now on it is in this stage; `place` stays as it was when it is left out."""
        self._stage = stage, self._stage[1] if place is None else place, queued, time.monotonic()

    @property
    def stage(self) -> Stage:
        return Stage(*self._stage)

    def __enter__(self) -> Wait:
        self.task = _current_task()
        if self._list is not None:
            self._list.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._list is not None:
            self._list.discard(self)


@dataclass(frozen=True)
class Standing:
    """A wait as it stood at one moment."""

    name: str
    details: str
    stage: Stage
    age_s: float
    """How long it has been in its stage."""
    task: asyncio.Task[Any] | None

    def __str__(self) -> str:
        parts = (self.name, self.stage.place, self.stage.name, self.details)
        return f"{self.age_s:.{1 if self.age_s < 10 else 0}f} s on {', '.join(part for part in parts if part)}"


class Waits:
    """All that is being waited for. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: set[Wait] = set()

    def __call__(self, name: str, stage: str, details: str = "", *, queued: bool = False) -> Wait:
        return Wait(name, details, stage, queued, self)

    def add(self, wait: Wait) -> None:
        with self._lock:
            self._all.add(wait)

    def discard(self, wait: Wait) -> None:
        with self._lock:
            self._all.discard(wait)

    def glance(self) -> tuple[float, bool]:
        """The longest age of all in seconds, and whether any of them is not queued: without the cost of `standing`."""
        with self._lock:
            stages = [wait._stage for wait in self._all]
        oldest = min((since for *_, since in stages), default=math.inf)
        return time.monotonic() - oldest, not all(queued for _, _, queued, _ in stages)

    def standing(self) -> list[Standing]:
        """As they stand now: what waits for nothing on the list first, and of those the longest first."""
        with self._lock:
            waits = list(self._all)
        now = time.monotonic()
        found = [Standing(w.name, w.details, stage, now - stage.since, w.task) for w in waits for stage in [w.stage]]
        return sorted(found, key=lambda standing: (standing.stage.queued, -standing.age_s))


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
