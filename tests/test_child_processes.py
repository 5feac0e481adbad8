"""Processes of our own end with their parent, whatever state they are in: real ones, with SIGSTOP and kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

CHILD = """\
import os, subprocess, time
from pathlib import Path
from sluice.processes import belong_to


def serve(fd, parent):
    belong_to(parent, fd)
    own = subprocess.Popen(["sleep", "600"])
    Path("pids.partial").write_text(f"{os.getpid()} {own.pid}")
    os.rename("pids.partial", "pids")
    time.sleep(600)
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


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_it_ends_with_its_parent_and_takes_along_what_it_started(tmp_path: Path, stopped: bool):
    """But not with the thread that started it: the kernel takes that for its parent."""
    (tmp_path / "child.py").write_text(CHILD)
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
