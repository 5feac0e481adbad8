"""The state of a run as text, taken from a thread of its own while the run goes on or hangs."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from sluice.hooks import first_line
from sluice.waits import Waits

Sections = Mapping[str, Callable[[], str]]
"""Title and text of each part of a dump."""


def dump_text(waits: Waits, sections: Sections, loop: asyncio.AbstractEventLoop) -> str:
    """Everything at once; a part that cannot be told says why, and the others are there."""
    everything: Sections = {
        "waits, what holds the run up first": lambda: "\n".join(map(str, waits.standing())) or "none",
        **sections,
        "asyncio tasks": lambda: _tasks(loop),
        "threads": _threads,
    }
    head = f"process {os.getpid()} at {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n"
    return head + "".join(f"\n== {title} ==\n{_told(section)}\n" for title, section in everything.items())


def _told(section: Callable[[], str]) -> str:
    try:
        return section().rstrip("\n")
    except Exception as error:  # the run goes on while it is looked at
        return f"cannot be told: {first_line(error)}"


def _tasks(loop: asyncio.AbstractEventLoop) -> str:
    tasks = sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
    running = asyncio.current_task(loop)
    return "\n".join(_task(task, task is running) for task in tasks) or "none"


def _task(task: asyncio.Task[Any], running: bool) -> str:
    if running:
        return f"{task.get_name()}: running, see the main thread"
    lines = [
        f'  File "{f.f_code.co_filename}", line {f.f_lineno}, in {f.f_code.co_name}' for f in _awaiting(task.get_coro())
    ]
    return "\n".join([f"{task.get_name()}:", *lines])


def _awaiting(awaited: Any) -> Iterator[FrameType]:
    """The frames of a suspended coroutine and of all that it awaits, outermost first. (`Task.get_stack` gives the first one.)"""
    while awaited is not None:
        kind = next((kind for kind in ("cr", "gi", "ag") if hasattr(awaited, f"{kind}_frame")), None)
        if kind is None:  # a future
            return
        if (frame := getattr(awaited, f"{kind}_frame")) is not None:
            yield frame
        awaited = getattr(awaited, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")


def _threads() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own = threading.get_ident()
    return "\n".join(
        f"{names.get(ident, 'a thread of other code')} ({ident}):\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()  # the one way to another thread's frames
        if ident != own
    )
