"""Environments in processes of their own, through the command line: the same samples, through kill -9 as well, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from processes import children, living_in
from sluice.viewer import report
from small_runs import events_of, finished, ledger_of, metrics_of, set_up, sluice, started, without_timings, workplace

MODULE = "sluice.environments.serving"
STEPS = 5
ENVIRONMENT = """\
import asyncio

from sluice.types import Trajectory


async def talk(prompt, policy):
    text = prompt.messages[0]["content"]
    for turn in range(3):
        reply = await policy.respond([{"role": "user", "content": text}])
        text += reply["content"][:3] + str(turn)
        policy.turns[-1].reward = reply["content"].count("a")
    return Trajectory(policy.turns, "talked")


async def slow_talk(prompt, policy):
    print("plays", prompt.id)
    await asyncio.sleep(0.2)
    return await talk(prompt, policy)


async def waits(prompt, policy):
    await policy.respond(prompt.messages)
    await asyncio.sleep(60)
"""
SCRIPT = """\
def answer(prompt_ids, sampling):
    return [10 + (sampling.seed >> k) % 100 for k in range(1 + sampling.seed % 7)] + [1]
"""


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(report, "write_report", lambda run: None)
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        (tmp_path / "talks.py").write_text(ENVIRONMENT)
        (tmp_path / "scripts.py").write_text(SCRIPT)
        yield tmp_path


def words_of(environment: str, num_workers: int, *more: str) -> list[str]:
    words = [f"rollout.environment=talks:{environment}", f"rollout.environment_workers={num_workers}"]
    return [*words, "trainer.learning_rate=1e-5", f"run.num_steps={STEPS}", *more]


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [row for step in range(1, STEPS + 1) for row in ledger_of(run, step)]


SAMPLED = "group", "index", "token_ids", "policy_versions", "turn_ids", "reward", "reward_parts", "outcome", "error"
"""What does not depend on which completions were decoded side by side: all but the last bits of log-probs, and what is computed of them."""


def sampled(run: Path) -> list[dict[str, Any]]:
    return [{name: row[name] for name in SAMPLED} for row in rows_of(run)]


def test_with_a_scripted_engine_it_is_the_run_without_them_to_the_last_bit(ready: Path):
    words = ("engine.name=scripted", "engine.script=scripts:answer", "algorithm.old_logprobs=recomputed")
    here, there = (finished("train", "config.yaml", *words_of("talk", n), *words, name=f"with-{n}") for n in (0, 3))
    assert rows_of(here) == rows_of(there)
    assert without_timings(metrics_of(here)) == without_timings(metrics_of(there))
    assert children(MODULE) == []


def test_a_model_samples_the_same_and_kills_change_nothing(ready: Path):
    """Every few tenths of a second each process is killed, but not twice in an attempt. What they print is in the log."""
    here = finished("train", "config.yaml", *words_of("slow_talk", 0), name="here")
    over, kills = threading.Event(), 0

    def kill() -> None:
        nonlocal kills
        path = Path("runs/killed/metrics.jsonl")
        while not over.wait(0.3):
            for pid in children(MODULE):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    kills += 1
            before = path.stat().st_size if path.exists() else 0
            while not over.is_set() and (not path.exists() or path.stat().st_size == before):
                time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        killed = finished("train", "config.yaml", *words_of("slow_talk", 2), name="killed")
    finally:
        over.set()
        killer.join()
    assert sampled(here) == sampled(killed)
    died = [event["message"] for event in events_of(killed) if event["kind"] == "environment_died"]
    assert kills >= 4
    assert died
    assert all(re.match(r"process \d+: its process was killed \(SIGKILL", message) for message in died)
    printed = re.findall(r"prompts-\d+", (killed / "environments.log").read_text())
    assert len(printed) > STEPS * 16, "those that were played again have printed again"
    assert set(printed) == {row["prompt_id"] for row in rows_of(killed)}


def until(condition: Callable[[], Any], limit_s: float = 60.0) -> Any:
    end = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {limit_s:g} s"
        time.sleep(0.02)
    return found


def test_their_state_is_told_and_they_end_with_their_run(ready: Path):
    words = ("run.name=test", "run.num_threads=1")
    run = started("train", "config.yaml", *words_of("waits", 2, *words), cwd=ready)
    try:
        until(lambda: len(children(MODULE, run.pid)) == 2)
        time.sleep(2)
        run.send_signal(signal.SIGUSR1)
        (dump,) = until(lambda: [e for e in events_of(Path("runs/test")) if e["kind"] == "dump"])
        text = Path(dump["details"]["path"]).read_text()
        told = re.findall(r"process (\d+): 8 attempts, 0 of them wait for the policy; last heard of [\d.]+ s ago", text)
        assert sorted(map(int, told)) == sorted(children(MODULE, run.pid)), text
        os.kill(int(told[0]), signal.SIGUSR1)
        until(lambda: "most recent call first" in Path("runs/test/environments.log").read_text())
    finally:
        run.kill()
        run.communicate()
    until(lambda: not living_in(ready).keys() - {os.getpid()})


def test_check_tries_a_step_with_one(ready: Path, capfd: pytest.CaptureFixture[str]):
    assert sluice("check", "config.yaml", *words_of("talk", 4)) == 0
    assert "trial     ok" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["rollout.environment_workers=2"],
            "rollout.environment_workers has no effect with rollout.environment=single_turn",
        ),
        (
            ["rollout.environment=talks:talk", "placement.name=ray", "placement.environment_cpus=2"],
            "placement.environment_cpus has no effect without rollout.environment_workers",
        ),
    ],
)
def test_what_has_no_effect_is_refused(
    ready: Path, words: list[str], complaint: str, capfd: pytest.CaptureFixture[str]
):
    assert sluice("train", "config.yaml", *words) == 2
    assert complaint in capfd.readouterr().err
