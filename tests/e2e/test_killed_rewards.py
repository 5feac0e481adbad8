"""kill -9 of reward processes, while idle, while computing, while starting, again and again: the run is the same run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sluice.viewer import report
from small_runs import events_of, finished, ledger_of, metrics_of, set_up, without_timings, workplace

NUM_STEPS, NUM_WORKERS = 8, 2
REWARD = """\
import os, time
from pathlib import Path

state = Path(f"state-{os.getpid()}")


def slow_share(prompt, trajectory):
    state.write_text("computing" if state.exists() else "first")
    time.sleep(0.02)
    state.write_text("idle")
    return sum(c.islower() for c in trajectory.response) / max(1, trajectory.num_response_tokens)
"""


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(report, "write_report", lambda run: None)
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        (tmp_path / "slow_reward.py").write_text(REWARD)
        yield tmp_path


def reward_processes() -> list[int]:
    """Of this process, started by whichever thread."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            children = map(int, (task / "children").read_text().split())
            found += [pid for pid in children if b"sluice.rewards.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


def stopped(pid: int) -> bool:
    """Whether it stands still within a moment; then what it computes cannot change before it is killed."""
    os.kill(pid, signal.SIGSTOP)
    for _ in range(100):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(0.001)
    return False


class Killer:
    """Kills every reward process that it meets; but no start before both have started since the last one that it killed, and not in its
    first sample: that may be one with which another process was killed, and twice is the limit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kills = {"starting": 0, "computing": 0, "idle": 0}
        self._end = threading.Event()
        self._may_kill_start = True

    @contextmanager
    def at_work(self) -> Iterator[None]:
        thread = threading.Thread(target=self._work)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()

    def _work(self) -> None:
        looks = 0
        while not self._end.wait(0.01):  # some states last for a few hundredths of a second
            looks += 1
            rarest = min(self.kills, key=self.kills.__getitem__)
            pids = reward_processes()
            if len(pids) == NUM_WORKERS and all(self._state(pid) != "starting" for pid in pids):
                self._may_kill_start = True
            for pid in pids:
                if looks % 15 and self._state(pid) != rarest:
                    continue
                with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                    if stopped(pid):
                        self._kill(pid)
                    os.kill(pid, signal.SIGCONT)

    def _state(self, pid: int) -> str:
        """One of those that are counted, or, where it must live, "first" or nothing: between two."""
        path = self.folder / f"state-{pid}"
        return path.read_text() if path.exists() else "starting"

    def _kill(self, pid: int) -> None:
        state = self._state(pid)
        if state not in self.kills or (state == "starting" and not self._may_kill_start):
            return
        if state == "starting":
            self._may_kill_start = False
        self.kills[state] += 1
        os.kill(pid, signal.SIGKILL)


def test_a_run_whose_reward_processes_are_killed_all_the_time_is_the_same_run(ready: Path):
    """Shown from the ledger: every sample of every ticket is there once and trained once, and every number is the same."""
    words = ["rewards=[{name: slow_reward:slow_share}]", f"reward_workers={NUM_WORKERS}", f"run.num_steps={NUM_STEPS}"]
    undisturbed = finished("train", "config.yaml", *words, name="undisturbed")
    killer = Killer(ready)
    with killer.at_work():
        killed = finished("train", "config.yaml", *words, name="killed")
    assert min(killer.kills.values()) >= 2, killer.kills
    assert sum(killer.kills.values()) >= 10, killer.kills
    names = [
        (row["group"], row["index"])
        for step in range(1, NUM_STEPS + 1)
        for row in ledger_of(killed, step)
        if row["trained"]
    ]
    assert names == [(group, index) for group in range(4 * NUM_STEPS) for index in range(4)]
    for step in range(1, NUM_STEPS + 1):
        assert ledger_of(killed, step) == ledger_of(undisturbed, step)
    assert without_timings(metrics_of(killed)) == without_timings(metrics_of(undisturbed))
    assert [event["kind"] for event in events_of(killed)] == [event["kind"] for event in events_of(undisturbed)]
