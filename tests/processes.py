"""Processes of runs, to be stopped and killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def children(module: str, parent: int | None = None) -> list[int]:
    """Those of a process, of this one if none is named, that serve such a module; by whichever thread they were started."""
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, its_parent = stat.read_text().rpartition(")")[2].split()[:2]
            ours = int(its_parent) == (parent or os.getpid()) and state != "Z"
            if ours and module.encode() in (stat.parent / "cmdline").read_bytes():
                found.append(int(stat.parent.name))
    return found


def engines(parent: int | None = None) -> list[int]:
    return children("sluice.engines.serving", parent)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """As long as the block; it may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
