"""A wall clock may jump: durations do not come from it, and names that do never collide."""

from __future__ import annotations

import ast
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from sluice import run as run_module
from sluice.tracking.rundir import RunDir
from sluice.viewer import report
from small_runs import events_of, finished, metrics_of, set_up, sluice, workplace

WALL = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
"""Calls whose values one might subtract. `strftime` gives text, which nobody does."""


def wall_clock_uses(code: str) -> list[str]:
    """Lines that read the wall clock as a number, or import the function that does."""
    found: list[str] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and any(f".{ast.unparse(node)}".endswith(f".{name}") for name in WALL):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            found += [f"{node.lineno}: {alias.name}" for alias in node.names if alias.name in ("time", "time_ns")]
    return found


def test_no_duration_is_taken_from_the_wall_clock():
    files = sorted((ROOT / "src").rglob("*.py"))
    assert len(files) > 50
    assert {str(file): uses for file in files if (uses := wall_clock_uses(file.read_text()))} == {}


@pytest.mark.parametrize(
    "code",
    ["import time\nx = time.time() - 1", "from time import time", "from datetime import datetime\ndatetime.now()"],
)
def test_a_planted_use_of_the_wall_clock_is_found(code: str):
    assert len(wall_clock_uses(code)) == 1


@pytest.mark.parametrize("code", ["import time\ntime.monotonic()", "time.strftime('%Y')", "run.timer('x')", "x.time()"])
def test_what_is_no_wall_clock_is_left_alone(code: str):
    assert wall_clock_uses(code) == []


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(report, "write_report", lambda run: None)
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        yield tmp_path


def jump(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one look at the wall clock to the next it is an hour later, then an hour earlier."""
    real, hours = (
        {name: getattr(time, name) for name in ("time", "strftime", "localtime")},
        itertools.cycle([0, 1, 0, -1]),
    )

    def now() -> float:
        return real["time"]() + 3600 * next(hours)

    monkeypatch.setattr(time, "time", now)
    monkeypatch.setattr(
        time, "localtime", lambda seconds=None: real["localtime"](now() if seconds is None else seconds)
    )
    monkeypatch.setattr(time, "strftime", lambda form, at=None: real["strftime"](form, at or real["localtime"](now())))


def insane_durations(lines: list[dict[str, float]], at_most_s: float) -> list[str]:
    """Those under perf/ that no run of `at_most_s` seconds can have had."""
    return [
        f"step {line['step']}: {name} = {value}"
        for line in lines
        for name, value in line.items()
        if name.startswith("perf/") and name.endswith("_s") and name != "perf/tokens_per_s"
        if not (math.isfinite(value) and 0 <= value <= at_most_s)
    ]


def test_a_run_whose_clock_jumps_records_sane_durations(
    ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    jump(monkeypatch)
    start = time.monotonic()
    run = finished("train", "config.yaml", "checkpoint.every_steps=1", "watchdog.warn_after_s=60")
    took_s = time.monotonic() - start
    lines = metrics_of(run)
    assert len(lines) == 3
    assert insane_durations(lines, took_s) == []
    assert all(line["perf/step_s"] > 0 and line["perf/tokens_per_s"] > 0 for line in lines)
    assert [event for event in events_of(run) if event["kind"] == "waiting"] == []
    console = capsys.readouterr().out
    assert "h" not in "".join(line.split()[-1] for line in console.splitlines() if line[:2] in ("1/", "2/", "3/"))


def test_a_duration_from_the_wall_clock_would_be_seen(ready: Path, monkeypatch: pytest.MonkeyPatch):
    """Planted: the timer of a run that reads the clock that jumps."""
    jump(monkeypatch)

    class Wall:
        perf_counter = staticmethod(time.time)

    monkeypatch.setattr(run_module, "time", Wall)
    run = finished("train", "config.yaml")
    assert insane_durations(metrics_of(run), 600)


def test_names_with_a_time_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two runs and two dumps of one second, as after a clock was set back."""
    monkeypatch.setattr(time, "strftime", lambda form, *_: "20260101-120000")
    names = [RunDir.create_stamped(tmp_path, "gsm8k").path.name for _ in range(3)]
    assert names == ["gsm8k-20260101-120000", "gsm8k-20260101-120000-2", "gsm8k-20260101-120000-3"]
    rundir = RunDir(tmp_path / names[0])
    dumps: list[Any] = []
    for _ in range(3):
        dumps.append(rundir.create_dump())
        dumps[-1].write_text("full")
    assert [path.name for path in dumps] == [f"dump-20260101-120000{n}.txt" for n in ("", "-2", "-3")]


def test_a_folder_that_cannot_be_made_is_told_at_once(ready: Path):
    """And not tried again under other names."""
    (ready / "runs").write_text("a file")
    assert sluice("train", "config.yaml", "run.num_threads=1") == 2
