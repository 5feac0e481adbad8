"""An event loop in which waiting takes no time: its clock jumps to the next timer as soon as nothing else can run.

Code that waits by asyncio alone runs in it unchanged, hours of it in seconds, and always in the same order. What it asks to have
done in another thread is done on the spot, and takes no time either.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Stalled(RuntimeError):
    """Everything waits for something else, and no timer is set."""


class _Jumping(selectors.SelectSelector):
    """Where a loop would sleep until its next timer, this one moves its clock there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)  # Ctrl-C comes through a socket
        if not ready and timeout is None:
            raise Stalled("the simulation stands still: everything in it waits, and nothing is due at any time")
        self.now += 0.0 if ready else (timeout or 0.0)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._jumping.now

    def block(self, seconds: float) -> None:
        """What a computation does that keeps the loop from running: what was due meanwhile is late."""
        self._jumping.now += seconds

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


def run(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
