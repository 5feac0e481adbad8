"""A run that is killed 50 times at random instants ends with the weights and the consumed prompts of one that never was."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from same import assert_same_runs, consumed_prompts
from small_runs import events_of, set_up

NUM_KILLS, NUM_STEPS = 50, 320
WORDS = (
    *("config.yaml", "run.name=killed", "checkpoint.auto_resume=true", f"run.num_steps={NUM_STEPS}"),
    *("checkpoint.every_steps=2", "checkpoint.keep_last=2", "reward_workers=2", "algorithm.name=dapo"),
    *("trainer.updates_per_batch=4", "trainer.tokens_per_micro_batch=64", "trainer.learning_rate=1e-5"),
)


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [Path(sys.executable).with_name("sluice"), "train", *WORDS, *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def end_of(process: subprocess.Popen[bytes]) -> int:
    process.communicate(timeout=600)
    return process.returncode


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at_random(process: subprocess.Popen[bytes], run: Path, kind: str, rng: random.Random) -> str:
    """Kill -9 the process at an instant of some kind; gives what it was doing."""
    begun, end = lines(run / "metrics.jsonl"), time.monotonic() + 120
    if kind == "start":
        time.sleep(rng.uniform(0, 5))
    else:
        while lines(run / "metrics.jsonl") <= begun:  # it resumes, or begins, and makes a step
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            if lines(run / "metrics.jsonl") < begun:  # what came after the checkpoint was set aside
                begun = lines(run / "metrics.jsonl")
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.6))
    while kind == "checkpoint" and not list((run / "checkpoints").glob(".*.partial")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
    if kind == "checkpoint":
        time.sleep(rng.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if process.returncode != -signal.SIGKILL:
        return "ended by itself"
    if list((run / "checkpoints").glob(".*.partial")):
        return "writing a checkpoint"
    if list(run.rglob(".*.partial")):
        return "writing something else"
    return "before its first step" if lines(run / "metrics.jsonl") <= begun else "rollout, training or record"


@pytest.mark.proof
@pytest.mark.timeout(3000)
def test_fifty_kills_change_nothing(tmp_path: Path):
    set_up(tmp_path)
    whole, killed = tmp_path / "runs/whole", tmp_path / "runs/killed"
    assert end_of(start(tmp_path, "run.name=whole")) == 0
    rng, doing = random.Random(0), Counter[str]()
    for _ in range(NUM_KILLS):
        kind = rng.choices(["start", "step", "checkpoint"], [1, 2, 2])[0]
        doing[kill_at_random(start(tmp_path), killed, kind, rng)] += 1
    assert doing["ended by itself"] == 0
    assert doing["writing a checkpoint"] >= 5, doing
    assert end_of(start(tmp_path)) == 0
    assert_same_runs(whole, killed, NUM_STEPS)
    prompts = consumed_prompts(killed, NUM_STEPS)
    resumed = [event for event in events_of(killed) if event["kind"] == "resumed"]
    print(f"\n{NUM_KILLS} kills: {dict(doing)}; {len(resumed)} resumes; {len(prompts)} prompts consumed, each once")
    print(f"steps made twice and set aside: {sum(lines(p) for p in killed.glob('set-aside-*/metrics.jsonl'))}")
