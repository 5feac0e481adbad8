"""Says what a run waits for when it waits long, and all that can be known of it on SIGUSR1.

It is a thread, since what holds a run up may hold the event loop too: user code that blocks, or a call into torch.
"""

from __future__ import annotations

import asyncio
import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from sluice.dump import Sections, dump_text
from sluice.hooks import innermost_place
from sluice.interfaces import Tracker
from sluice.tracking.rundir import RunDir
from sluice.waits import Standing, Waits

LOOK_EVERY_S = 1.0
END_LIMIT_S = 10.0
"""For the thread to end: a disk that hangs may hold it."""
ASK_THE_ENGINE = ("engine", "publish")
"""Stages of which the engine can say more."""
SETTLE_S = 0.05
"""For a handler to write all stacks."""


class Watchdog:
    def __init__(
        self, waits: Waits, tracker: Tracker, rundir: RunDir, warn_after_s: float | None, sections: Sections
    ) -> None:
        """`sections` are parts of a dump; without `warn_after_s` nothing is told unasked."""
        self._waits = waits
        self._tracker = tracker
        self._rundir = rundir
        self._warn_after_s = warn_after_s or math.inf
        self._sections = sections
        self._told_after_s: dict[str, float] = {}
        """By stage, how long one may stand before it is told (again). It only grows: what takes long in every step is told
        in the first."""
        self._last_unqueued = time.monotonic()
        self._end = threading.Event()

    @contextmanager
    def watching(self) -> Generator[None]:
        """Watch the running event loop as long as the block, and heed SIGUSR1. Called in the loop's own thread."""
        loop, main = asyncio.get_running_loop(), threading.get_ident()
        stacks = self._rundir.stacks
        with open(stacks, "ab+", buffering=0) as file:
            thread = threading.Thread(
                target=self._watch, args=(loop, main, file.fileno()), name="watchdog", daemon=True
            )
            # A handler in C writes the stacks of all threads, also while Python cannot run; that the file grows is what the
            # thread sees. A handler in Python would wait for the main thread, which may be what hangs.
            if hasattr(signal, "SIGUSR1"):  # not on Windows
                faulthandler.register(signal.SIGUSR1, file, all_threads=True)
            thread.start()
            try:
                yield
            finally:
                self._end.set()
                thread.join(END_LIMIT_S)
                if hasattr(signal, "SIGUSR1"):
                    faulthandler.unregister(signal.SIGUSR1)
                if not stacks.stat().st_size:
                    stacks.unlink()

    def _watch(self, loop: asyncio.AbstractEventLoop, main: int, stacks: int) -> None:
        pulse = _Pulse(loop)
        while not self._end.wait(min(LOOK_EVERY_S, self._warn_after_s / 4)):
            try:
                if os.fstat(stacks).st_size:
                    self._dump(loop, stacks)
                self._warn(loop, main, pulse.silent_s())
            except OSError:
                pass  # a full disk, of which the run itself will tell
            except Exception as error:
                self._tracker.event("watchdog", f"it has stopped looking: {type(error).__name__}: {error}")
                return

    def _warn(self, loop: asyncio.AbstractEventLoop, main: int, silent_s: float) -> None:
        oldest_s, any_unqueued = self._waits.glance()
        if any_unqueued:
            self._last_unqueued = time.monotonic()
        if oldest_s < self._warn_after_s:
            return
        standing = self._waits.standing()
        candidates = [s for s in standing if not s.stage.queued]
        if not candidates and time.monotonic() - self._last_unqueued >= self._warn_after_s:
            candidates = standing  # what is queued waits for the others, and there have been none for long
        due = [s for s in candidates if s.age_s >= self._told_after_s.get(s.stage.name, self._warn_after_s)]
        if not due:
            return
        for late in due:
            self._told_after_s[late.stage.name] = self._next_after(late.age_s)
        blocked = silent_s >= self._warn_after_s / 2
        named = _running(candidates, loop) if blocked else None
        self._tell(named or due[0], standing, sys._current_frames().get(main) if blocked else None, silent_s)

    def _tell(self, named: Standing, standing: Sequence[Standing], frame: FrameType | None, silent_s: float) -> None:
        """`frame` is where the event loop's thread is, when the loop does not run."""
        parts = [str(named)]
        others = Counter(s.stage.name for s in standing if s is not named)
        if others:
            counts = ", ".join(f"{count} {stage}" for stage, count in others.most_common())
            parts.append(f"{others.total()} others: {counts}")
        if named.stage.name in ASK_THE_ENGINE and (engine := self._sections.get("engine")):
            said = engine().replace("\n", ", ")
            parts.append(said if said.startswith("the engine: ") else f"the engine: {said}")
        place = innermost_place(frame)
        if place:
            parts.append(f"the event loop has not run for {silent_s:.0f} s and is at {place}")
        self._tracker.event(
            "waiting",
            "; ".join(parts),
            name=named.name,
            stage=named.stage.name,
            place=named.stage.place,
            details=named.details,
            age_s=round(named.age_s, 1),
            others=dict(others),
            event_loop_at=place,
        )

    def _next_after(self, age_s: float) -> float:
        """The first of warn_after_s · 1, 2, 4 … that is still to come."""
        after_s = self._warn_after_s
        while after_s <= age_s:
            after_s *= 2
        return after_s

    def _dump(self, loop: asyncio.AbstractEventLoop, stacks: int) -> None:
        time.sleep(SETTLE_S)
        at_signal = os.pread(stacks, os.fstat(stacks).st_size, 0).decode(errors="replace")
        os.ftruncate(stacks, 0)
        sections = {**self._sections, "threads at the signal, innermost frame first": lambda: at_signal}
        path = self._rundir.create_dump()
        path.write_text(dump_text(self._waits, sections, loop))
        self._tracker.event("dump", f"the state of the run is in {path}", path=str(path))


class _Pulse:
    """Whether the event loop still runs."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asked: float | None = None

    def silent_s(self) -> float:
        """Seconds since it was asked for a sign and gave none. Asks when no question is open."""
        asked = self._asked
        if asked is not None:
            return time.monotonic() - asked
        self._asked = time.monotonic()
        with suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._answer)
        return 0.0

    def _answer(self) -> None:
        self._asked = None


def _running(standing: Sequence[Standing], loop: asyncio.AbstractEventLoop) -> Standing | None:
    """The one whose task the event loop is in at the moment."""
    task = asyncio.current_task(loop)
    return next((s for s in standing if s.task is not None and s.task is task), None)
