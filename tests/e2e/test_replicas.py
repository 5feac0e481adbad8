"""Several engines in processes of their own: the same run whatever their timing; hung ones are found out, and the run goes on."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from processes import engines, stopped
from sluice.viewer import report
from small_runs import events_of, finished, ledger_of, metrics_of, set_up, sluice, without_timings, workplace

TWO = ("engine.process=own", "engine.replicas=2", "engine.num_threads=1")


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(report, "write_report", lambda run: None)
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        yield tmp_path


@contextmanager
def meanwhile(work: Any) -> Iterator[threading.Event]:
    """Calls `work(rng)` again and again in a thread, until the block ends or it says that it is done; then the event is set."""
    end, done, rng = threading.Event(), threading.Event(), random.Random(0)

    def loop() -> None:
        while not end.is_set() and not done.is_set():
            if work(rng):
                done.set()
            time.sleep(0.005)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield done
    finally:
        end.set()
        thread.join()


def hold_up(rng: random.Random) -> None:
    """One of the engines stands still for a moment."""
    if pids := engines():
        pid = rng.choice(pids)
        with stopped(pid):
            time.sleep(rng.uniform(0, 0.1))


def rows_of(run: Path, steps: int) -> list[dict[str, Any]]:
    return [row for step in range(1, steps + 1) for row in ledger_of(run, step)]


def samples_of(run: Path, steps: int) -> Counter[tuple[int, int]]:
    return Counter((row["group"], row["index"]) for row in rows_of(run, steps) if row["trained"])


def each_once(num_groups: int) -> dict[tuple[int, int], int]:
    return {(group, index): 1 for group in range(num_groups) for index in range(4)}


def test_without_staleness_two_runs_are_one_to_the_last_bit(ready: Path):
    """Every column of the ledger and every metric, though the engines are held up at random; and both have worked."""
    steps = ("run.num_steps=6", "algorithm.name=dapo", "rollout.max_new_tokens=24")
    runs: list[Path] = []
    for name in ("one", "other"):
        with meanwhile(hold_up):
            runs.append(finished("train", "config.yaml", *TWO, *steps, name=name))
    one, other = runs
    assert rows_of(one, 6) == rows_of(other, 6)
    assert without_timings(metrics_of(one)) == without_timings(metrics_of(other))
    asked = [sum(line[f"perf/engine_requests/{k}"] for line in metrics_of(one)) for k in range(2)]
    assert asked[0] == asked[1] > 0
    assert not engines()


def test_a_killed_engine_is_made_up_for_by_the_other(ready: Path):
    def kill_one(rng: random.Random) -> bool:
        pids = engines()
        if len(pids) < 2 or not Path("runs/test/metrics.jsonl").exists():
            return False
        with suppress(ProcessLookupError):
            os.kill(rng.choice(pids), signal.SIGKILL)
        return True

    options = ("rollout.max_staleness=1", "rollout.max_new_tokens=60", "run.num_steps=12")
    with meanwhile(kill_one) as killed:
        run = finished("train", "config.yaml", *TWO, *options)
    assert killed.is_set()
    assert samples_of(run, 12) == each_once(48)
    died = [event["message"] for event in events_of(run) if event["kind"] == "engine_died"]
    assert len(died) == 1
    assert "its process was killed (SIGKILL" in died[0]
    assert sum(line["perf/lost_engines"] for line in metrics_of(run)) == 1
    assert "see " not in died[0], "its log is empty"


def test_a_hung_engine_is_found_out(ready: Path):
    """It stands still in the middle of its work; what it had not answered is asked of the other one."""
    hung: list[int] = []

    def hang_one(rng: random.Random) -> bool:
        if Path("runs/test/metrics.jsonl").exists() and (pids := engines()):
            hung.append(rng.choice(pids))
            os.kill(hung[0], signal.SIGSTOP)
        return bool(hung)

    with meanwhile(hang_one):
        run = finished("train", "config.yaml", *TWO, "engine.hang_timeout_s=3", "run.num_steps=6")
    assert hung
    assert samples_of(run, 6) == each_once(24)
    (died,) = (event["message"] for event in events_of(run) if event["kind"] == "engine_died")
    assert "it gave no sign of life for 3 s (engine.hang_timeout_s) and was killed" in died
    assert not Path(f"/proc/{hung[0]}").exists()


def see_sitecustomize(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started import it first."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)


@pytest.mark.proof
def test_an_engine_whose_decoding_makes_no_progress_is_found_out(ready: Path, monkeypatch: pytest.MonkeyPatch):
    """Its event loop runs, and its completions do not."""
    (ready / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'sluice.engines.serving' in ' '.join(sys.orig_argv) and not os.path.exists('stuck'):\n"
        "    import asyncio\n"
        "    from sluice.engines.embedded import EmbeddedEngine\n"
        "    step = EmbeddedEngine._step\n"
        "    async def never(self):\n"
        "        open('stuck', 'w').close()\n"
        "        await asyncio.Event().wait()\n"
        "    EmbeddedEngine._drive = never\n"
    )
    see_sitecustomize(ready, monkeypatch)
    run = finished("train", "config.yaml", "engine.process=own", "engine.num_threads=1", "engine.hang_timeout_s=3")
    assert (ready / "stuck").exists()
    assert samples_of(run, 3) == each_once(12)
    (died,) = (event["message"] for event in events_of(run) if event["kind"] == "engine_died")
    assert "it got nothing of its work done for 3 s (engine.hang_timeout_s)" in died


@pytest.mark.proof
def test_an_engine_is_not_blamed_for_taking_weights_over(ready: Path, monkeypatch: pytest.MonkeyPatch):
    """Its unfinished completions wait meanwhile, for longer than its work may take."""
    (ready / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'sluice.engines.serving' in ' '.join(sys.orig_argv):\n"
        "    import time\n"
        "    from sluice.weights.shared_memory import SharedInlet\n"
        "    read = SharedInlet.read\n"
        "    def slow(self, model, version):\n"
        "        time.sleep(5 * (version == 1))\n"
        "        read(self, model, version)\n"
        "    SharedInlet.read = slow\n"
    )
    see_sitecustomize(ready, monkeypatch)
    lengths = ("rollout.max_staleness=1", "rollout.max_new_tokens=200", "run.num_steps=2")
    words = ("engine.process=own", "engine.num_threads=1", "engine.num_slots=4", "engine.hang_timeout_s=3", *lengths)
    run = finished("train", "config.yaml", *words)
    assert [event["kind"] for event in events_of(run)] == []
    assert any(len(set(row["policy_versions"]) - {-1}) > 1 for row in rows_of(run, 2)), "none was unfinished"


@pytest.mark.proof
def test_an_engine_is_not_blamed_for_what_holds_up_the_trainer(ready: Path):
    """The event loop that would read its signs of life stands still for longer than they may take."""
    (ready / "slow.py").write_text(
        "import time\ndef keep(group):\n    time.sleep(4 * (group.id == 5))\n    return True\n"
    )
    run = finished("train", "config.yaml", *TWO, "engine.hang_timeout_s=2", "rollout.filter=slow:keep")
    assert [event["kind"] for event in events_of(run)] == []


@pytest.mark.parametrize("setting", ["replicas=2", "hang_timeout_s=10"])
def test_settings_without_effect_are_refused(ready: Path, setting: str, capsys: pytest.CaptureFixture[str]):
    assert sluice("train", "config.yaml", f"engine.{setting}") != 0
    assert "has no effect with engine.process=trainer" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "check"])
def test_more_threads_than_cores_are_refused(ready: Path, command: str, capsys: pytest.CaptureFixture[str]):
    assert sluice(command, "config.yaml", "engine.process=own", "engine.num_threads=1000") != 0
    said = capsys.readouterr()
    assert "engine.num_threads=1000 is more than" in said.err + said.out
