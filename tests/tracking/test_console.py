"""What a run says on a terminal, and where there is none."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
from rich.console import Console

from sluice.tracking.console import LINES_PER_HEADER, ConsoleTracker

RL = {
    "rollout/reward": 0.5123,
    "rollout/reward/recheck": 0.25,
    "rollout/response_len/mean": 33.34,
    "train/loss": 0.1,
    "train/ppo_kl": -1.23e-4,
    "train/pg_clipfrac": 0.0123,
    "train/entropy": 1.2,
    "train/grad_norm": 0.3,
    "rollout/staleness/mean": 0.875,
    "perf/tokens_per_s": 12345.6,
    "perf/step_s": 2.345,
}
SFT = {"train/loss": 1.5, "train/grad_norm": 0.3, "perf/tokens_per_s": 900.0, "perf/step_s": 2.0}


def plain(
    num_steps: int = 100, extra: tuple[str, ...] = (), encoding: str = "utf-8"
) -> tuple[ConsoleTracker, io.BytesIO]:
    out = io.BytesIO()
    return ConsoleTracker(num_steps, extra, Console(file=io.TextIOWrapper(out, encoding), width=40)), out


def lines(out: io.BytesIO, encoding: str = "utf-8") -> list[str]:
    return out.getvalue().decode(encoding).splitlines()


def test_a_step_is_one_line_under_its_titles_without_control_codes():
    """Also where it is wider than the console: a log file has no width."""
    tracker, out = plain(extra=("rollout/reward/recheck",))
    tracker.log(1, RL)
    tracker.close()
    titles, step = lines(out)
    assert titles.split() == [
        "step",
        "reward",
        "reward/recheck",
        "length",
        "ppo_kl",
        "clipped",
        "entropy",
        "grad",
        "stale",
        "tok/s",
        "s/step",
        "left",
    ]
    values = ["1/100", "0.512", "0.250", "33.3", "-1.2e-04", "1.23%", "1.200", "0.3", "0.88", "12,346", "2.35"]
    assert step.split()[:-1] == values
    assert [cell.end() for cell in re.finditer(r"\S+", titles)] == [cell.end() for cell in re.finditer(r"\S+", step)]
    assert "\x1b" not in titles + step


def test_columns_are_those_of_the_first_step_and_a_missing_metric_is_a_dash():
    tracker, out = plain(extra=("rollout/reward/none",))
    tracker.log(1, RL)
    tracker.log(2, {"rollout/reward": float("nan")})
    assert lines(out)[2].split()[:-1] == ["2/100", "nan", *"–––––––––"]


def test_supervised_fine_tuning_shows_its_loss():
    tracker, out = plain()
    tracker.log(10, SFT)
    titles, step = lines(out)
    assert titles.split() == ["step", "loss", "grad", "tok/s", "s/step", "left"]
    assert step.split()[:-1] == ["10/100", "1.5000", "0.3", "900", "2"]


@pytest.mark.parametrize(
    ("seconds_per_step", "left"), [(0.5, "49s"), (1.0, "1m38s"), (60.0, "1h38m"), (3661.0, "99h39m")]
)
def test_the_time_left_follows_the_clock(monkeypatch: pytest.MonkeyPatch, seconds_per_step: float, left: str):
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    tracker, out = plain()
    monkeypatch.setattr("time.monotonic", lambda: 1000.0 + 2 * seconds_per_step)
    tracker.log(2, SFT)
    assert lines(out)[1].split()[-1] == left


def test_titles_come_again_before_they_are_out_of_sight():
    tracker, out = plain()
    for step in range(LINES_PER_HEADER + 1):
        tracker.log(step + 1, SFT)
    assert [i for i, line in enumerate(lines(out)) if "loss" in line] == [0, LINES_PER_HEADER + 1]


def test_an_event_is_one_line_whatever_its_message_holds():
    tracker, out = plain()
    tracker.event("no_score", "a\nb \x1b[2J[bold]\x07\ud800 end", step=3)
    assert lines(out) == ["no_score: a b  [2J[bold] ? end"]


def test_a_console_of_another_encoding_does_not_end_the_run():
    tracker, out = plain(extra=("rollout/reward/none",), encoding="ascii")
    tracker.log(1, RL)
    tracker.event("stopped", "größer – 数")
    assert lines(out, "ascii")[-1] == "stopped: gr??er ? ?"


def test_a_terminal_has_a_bar_and_yellow_events_and_gets_its_cursor_back():
    """In a real pseudo-terminal."""
    code = f"""
import time
from sluice.tracking.console import ConsoleTracker
tracker = ConsoleTracker(4)
tracker.log(1, {SFT})
tracker.event("no_score", "prompt 3")
tracker.log(2, {SFT})
time.sleep(0.3)
tracker.close()
"""
    screen, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "NO_COLOR": ""}
    environment.pop("TTY_COMPATIBLE", None)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=end, stderr=end, env=environment)
    os.close(end)
    output = _read(screen)
    assert process.wait(60) == 0
    assert re.search(r"step 2/4, \d+s left", output)
    assert re.search(r"1/4 +1\.5000", output)
    assert "\x1b[33mno_score: prompt 3\x1b[0m" in output
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")


def _read(file: int) -> str:
    """All that is written to a pseudo-terminal until its last writer is gone."""
    chunks, end = [], time.monotonic() + 60
    while select.select([file], [], [], max(0, end - time.monotonic()))[0]:
        try:
            chunks.append(os.read(file, 65536))
        except OSError:  # how Linux says that nobody writes any more
            break
        if not chunks[-1]:
            break
    os.close(file)
    return b"".join(chunks).decode()


def test_a_reward_of_several_parts_shows_their_sum():
    """Its metrics are rollout/reward/near/digits and …/right; there is none of its own name."""
    out = io.StringIO()
    tracker = ConsoleTracker(1, extra=("rollout/reward/near",), console=Console(file=out, width=200))
    tracker.log(1, {"rollout/reward": 0.75, "rollout/reward/near/digits": 0.25, "rollout/reward/near/right": 0.5})
    tracker.close()
    assert out.getvalue().splitlines()[-1].count("0.750") == 2
