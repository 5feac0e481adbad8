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


def living_in(folder: Path) -> dict[int, str]:
    """The command lines of all processes that work in it: those of a run that was started there, wherever they come from."""
    found: dict[int, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if Path(os.readlink(process / "cwd")) == folder:
                found[int(process.name)] = command(int(process.name))
    return found


def command(pid: int) -> str:
    """Its words, with spaces between them. Raises OSError when it has ended."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def parent_of(pid: int) -> int:
    """Raises OSError when it has ended."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


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
