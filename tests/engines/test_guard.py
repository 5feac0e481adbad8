"""Of a server nothing is left, whichever of its processes, its guard, its guard's parent, or all of them, is killed."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from processes import living_in
from sluice.engines.guard import Command, Start
from sluice.processes import Process

SERVER = """\
import os, subprocess, sys, tempfile, time
from multiprocessing.shared_memory import SharedMemory

memory = SharedMemory(create=True, size=8)
met = tempfile.NamedTemporaryFile(prefix="vllm_dist_", delete=False).name  # as two of vLLM's ranks on CPUs
for rank in range(2):
    open(f"/dev/shm/{os.path.basename(met)}-tp:0-[0-1]-cpushm_{rank}", "w")
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open("partial", "w") as file:
    file.write(f"{os.getpid()} {memory.name} {met}")
os.rename("partial", "ready")
time.sleep(600)
"""
ENDS: dict[str, Callable[[Process, int], None]] = {
    "server": lambda guard, server: os.kill(server, signal.SIGKILL),
    "guard": lambda guard, server: os.kill(guard.pid, signal.SIGKILL),
    "guard's parent": lambda guard, server: guard.socket.close(),
    "all of them": lambda guard, server: guard.kill(),
}


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("ends_first", ENDS)
def test_nothing_is_left(ends_first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Shared memory neither, where the guard can see to it: that of vLLM's ranks always, and nobody else's."""
    long = tmp_path.joinpath(*["of a job"] * 12)
    long.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(long))
    others = Path(f"/dev/shm/vllm_dist_{tmp_path.name}{os.getpid()}-tp:0-[0-1]-cpushm_0")
    others.touch()
    guard = Process("sluice.engines.guard", path=sys.path, folder=str(tmp_path), log=None, variables={})
    try:
        start = pickle.dumps(Start(Command([sys.executable, "-c", SERVER], {}), tmp_path))
        guard.socket.sendall(len(start).to_bytes(8) + start)
        wait_until((tmp_path / "ready").exists)
        server, name, met = (tmp_path / "ready").read_text().split()
        scratch = str(Path(met).parent)
        memory = Path("/dev/shm") / name
        assert memory.exists()
        assert len(list(Path("/dev/shm").glob(f"{Path(met).name}-*"))) == 2
        assert len(scratch) < 107 - len("/00000000-0000-0000-0000-000000000000"), "no room for the name of a socket"
        assert len(living_in(tmp_path)) > 3  # among them Python's resource tracker
        ENDS[ends_first](guard, int(server))
        wait_until(lambda: not living_in(tmp_path))
        wait_until(lambda: not Path(scratch).exists())
        assert not list(Path("/dev/shm").glob(f"{Path(met).name}*"))
        assert others.exists()
        assert memory.exists() == (ends_first in ("guard", "all of them"))
    finally:
        guard.kill()
        memory.unlink(missing_ok=True)
        others.unlink()
