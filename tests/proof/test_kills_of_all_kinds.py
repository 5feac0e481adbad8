"""Trainer, engines and reward processes of one run are killed at random instants: no sample is lost, and none is trained twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from processes import children, engines
from same import consumed_prompts
from sluice.tracking import ledger
from sluice.tracking.rundir import RunDir
from small_runs import events_of, ledger_of, set_up, started

NUM_KILLS, LIMIT_S = 20, 120.0
REWARD = """\
import time


def slow_share(prompt, trajectory):
    time.sleep(0.01)
    return sum(c.islower() for c in trajectory.response) / max(1, trajectory.num_response_tokens)
"""
WORDS = (
    *("train", "config.yaml", "run.name=killed", "run.num_steps=100000", "run.num_threads=1"),
    *("checkpoint.auto_resume=true", "checkpoint.every_steps=3", "trainer.learning_rate=1e-5"),
    *("engine.process=own", "engine.replicas=2", "engine.num_threads=1", "engine.max_restarts=20"),
    *("rollout.max_staleness=1", "rollout.max_new_tokens=40"),
    *("rewards=[{name: slow_reward:slow_share}]", "reward_workers=2"),
)
KINDS: dict[str, Callable[[subprocess.Popen[str]], list[int]]] = {
    "trainer": lambda run: [run.pid],
    "engine": lambda run: engines(run.pid),
    "reward process": lambda run: children("sluice.rewards.worker", run.pid),
}


def wait_for(condition: Callable[[], object], run: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def num_lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_twenty_kills_of_all_kinds_cost_no_sample(tmp_path: Path):
    set_up(tmp_path)
    (tmp_path / "slow_reward.py").write_text(REWARD)
    run, rng, kills = tmp_path / "runs/killed", random.Random(0), Counter[str]()
    process = started(*WORDS, cwd=tmp_path)
    try:
        while kills.total() < NUM_KILLS:
            kind = rng.choices([*KINDS], [1, 2, 2])[0]
            if rng.random() < 0.5:  # after a step, else perhaps while something is starting
                before = num_lines(run)
                wait_for(lambda before=before: num_lines(run) != before, process)
            time.sleep(rng.uniform(0, 2))
            assert process.poll() is None, process.communicate()
            if not (pids := KINDS[kind](process)):
                continue
            with suppress(ProcessLookupError):
                os.kill(rng.choice(pids), signal.SIGKILL)
                kills[kind] += 1
            if kind == "trainer":
                process.communicate()
                process = started(*WORDS, cwd=tmp_path)
        before = num_lines(run)
        wait_for(lambda: num_lines(run) not in range(before + 3), process)
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=LIMIT_S)
    assert "stopped by SIGTERM" in said[1]
    steps = ledger.steps(RunDir(run))
    assert steps == [*range(1, len(steps) + 1)]
    trained = Counter((r["group"], r["index"]) for step in steps for r in ledger_of(run, step) if r["trained"])
    groups = [group for group, _, is_trained in consumed_prompts(run, len(steps)) if is_trained]
    assert trained == {(group, index): 1 for group in groups for index in range(4)}
    events = Counter(event["kind"] for event in events_of(run))
    assert events["engine_died"] >= kills["engine"] - 1  # one that nobody needed any more is not missed
    print(
        f"\nkills: {dict(kills)}; {len(steps)} steps, {trained.total()} samples, each trained once; events: {dict(events)}"
    )
