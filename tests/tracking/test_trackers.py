"""Trackers write what they are told, where the layout says, and several act as one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sluice.tracking.ledger import read_step
from sluice.tracking.rundir import RunDir, read_lines
from sluice.tracking.tracker import FileTracker, Trackers
from sluice.types import Completion, Group, Prompt, Trajectory, Turn


def pieces(ids: Any) -> list[str]:
    return [f"<{i}>" for i in ids]


def test_file_tracker_writes_metrics_events_and_ledger(tmp_path: Path):
    rundir = RunDir.create(tmp_path, "run")
    tracker = FileTracker(rundir, pieces)
    tracker.log(1, {"rollout/reward": 0.5, "train/loss": float("nan")})
    tracker.event("no_score", "prompt p: timeout", outcomes=["timeout"], step=1)
    group = Group(1, Prompt("p", []), [Trajectory([Turn([1], Completion([2], [-1.0], "stop", [0], 1.0))])], "filter")
    tracker.log_groups(1, [group], [])
    tracker.close()
    assert read_lines(rundir.metrics) == [{"step": 1, "rollout/reward": 0.5, "train/loss": None}]
    (event,) = read_lines(rundir.events)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", event.pop("time"))
    details = {"outcomes": ["timeout"], "step": 1}
    assert event == {"kind": "no_score", "message": "prompt p: timeout", "details": details}
    assert read_step(rundir, 1)["tokens"].to_pylist() == [["<1>", "<2>"]]


class Listener:
    def __init__(self, heard: list[Any], fails: bool = False) -> None:
        self.heard, self.fails = heard, fails

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.heard.append((step, metrics))

    def log_groups(self, step: int, groups: Any, samples: Any, fingerprint: str | None = None) -> None:
        self.heard.append((step, groups, samples, fingerprint))

    def event(self, kind: str, message: str, **details: Any) -> None:
        self.heard.append((kind, message, details))

    def close(self) -> None:
        self.heard.append("closed")
        if self.fails:
            raise OSError("cannot close")


def test_several_trackers_hear_everything_and_all_are_closed_even_when_one_fails():
    heard: list[list[Any]] = [[], [], []]
    trackers = Trackers([Listener(heard[0]), Listener(heard[1], fails=True), Listener(heard[2])])
    trackers.log(1, {"a": 2.0})
    trackers.log_groups(1, [], [], "f00d")
    trackers.event("kind", "message", detail=3)
    with pytest.raises(OSError, match="cannot close"):
        trackers.close()
    assert heard == [[(1, {"a": 2.0}), (1, [], [], "f00d"), ("kind", "message", {"detail": 3}), "closed"]] * 3
