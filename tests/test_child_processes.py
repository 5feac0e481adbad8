"""Processes of our own end with their parent, whatever state they are in: real ones, with SIGSTOP and kill -9."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sluice.processes import Process

CHILD = """\
import os, re, subprocess, time
from pathlib import Path
from sluice.processes import belong_to


def serve(fd, parent):
    belong_to(parent, fd)
    own = subprocess.Popen(["sleep", "600"])
    Path("pids.partial").write_text(f"{{os.getpid()}} {{own.pid}}")
    os.rename("pids.partial", "pids")
    {then}
"""
PARENT = """\
import sys, threading, time
from pathlib import Path
from sluice.processes import Process


def start():
    process = Process("child", path=[".", *sys.path], folder=".", log=Path("child.log"), variables={})
    while not Path("pids").exists():
        time.sleep(0.01)


thread = threading.Thread(target=start)
thread.start()
thread.join()
Path("the thread has ended").touch()
time.sleep(600)
"""


def running(pid: int) -> bool:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def within(limit_s: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + limit_s
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return holds


BLOCKED = "re.match('(a+)+$', 'a' * 45 + 'b')"
"""In C code that lets no thread of Python run."""


@pytest.mark.parametrize(
    ("then", "stopped"),
    [("time.sleep(600)", False), ("time.sleep(600)", True), (BLOCKED, False)],
    ids=["running", "stopped", "blocked"],
)
def test_it_ends_with_its_parent_and_takes_along_what_it_started(tmp_path: Path, then: str, stopped: bool):
    """But not with the thread that started it: the kernel takes that for its parent."""
    (tmp_path / "child.py").write_text(CHILD.format(then=then))
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path)
    try:
        assert within(60, (tmp_path / "the thread has ended").exists)
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert not within(1.5, lambda: not all(map(running, pids)))
        if stopped:
            os.kill(pids[0], signal.SIGSTOP)
    finally:
        parent.kill()
        parent.wait()
    assert within(20, lambda: not any(map(running, pids)))


@contextmanager
def child(folder: Path, code: str, log: Path) -> Iterator[socket.socket]:
    """One whose `serve` does that after the beginning; the connection to it."""
    lines = ["import os, sys, time", "from sluice.processes import belong_to", "def serve(fd, parent):"]
    body = ["pipe = belong_to(parent, fd)", *code.splitlines()]
    (folder / "other.py").write_text("\n".join([*lines, *(f"    {line}" for line in body)]))
    process = Process("other", path=[str(folder), *sys.path], folder=str(folder), log=log, variables={})
    try:
        pipe = process.connect()
        pipe.settimeout(30)
        yield pipe
    finally:
        process.kill()


def test_its_end_is_seen_though_what_it_forked_lives_on(tmp_path: Path):
    ends = "if os.fork():\n    os.kill(os.getpid(), 9)\ntime.sleep(600)"
    with child(tmp_path, ends, tmp_path / "log") as pipe:
        assert pipe.recv(1) == b""


def test_what_it_prints_on_a_full_disk_is_lost_and_no_error(tmp_path: Path):
    says = 'print("x" * 5000)\nprint("y", file=sys.stderr)\npipe.sendall(b"well")'
    with child(tmp_path, says, Path("/dev/full")) as pipe:
        assert pipe.recv(4) == b"well"
