"""A blocking call that never returns costs its attempt, and neither other calls nor the end of the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from sluice.threads import DaemonThreads

SCRIPT = """
import asyncio, time
from sluice.threads import DaemonThreads

async def main():
    if {ours}:
        asyncio.get_running_loop().set_default_executor(DaemonThreads())
    for _ in range(40):  # more than a pool has threads
        try:
            async with asyncio.timeout(0.01):
                await asyncio.to_thread(time.sleep, 3600)
        except TimeoutError:
            pass
    print(await asyncio.to_thread(lambda: "another call"), flush=True)

asyncio.run(main())
"""


def run(ours: bool, limit_s: float) -> subprocess.CompletedProcess[str]:
    code = SCRIPT.format(ours=ours)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=limit_s)


def test_calls_that_hang_hold_nothing_up():
    done = run(ours=True, limit_s=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "another call\n", "")


def test_in_a_pool_they_would():
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run(ours=False, limit_s=4)
    assert not caught.value.stdout


def test_results_and_errors_come_back():
    async def calls() -> list[object]:
        asyncio.get_running_loop().set_default_executor(DaemonThreads())
        start = time.monotonic()
        names = await asyncio.gather(*(asyncio.to_thread(threading.current_thread) for _ in range(50)))
        assert len(set(names)) == 50
        assert all(thread.daemon for thread in names)
        return [time.monotonic() - start, *await asyncio.gather(asyncio.to_thread(int, "x"), return_exceptions=True)]

    seconds, error = asyncio.run(calls())
    assert isinstance(error, ValueError)
    assert float(str(seconds)) < 5
