"""The recheck task is what its docs say, and (proof) the demo learns."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples/recheck"))

from demo import metrics_of  # noqa: E402
from task import RECHECK, columns, demonstrations, problem, questions, write_task  # noqa: E402


def test_columns_carry() -> None:
    assert columns(347, 586) == "7+6=13,4+8+1=13,3+5+1=9"
    assert columns(120, 305) == "0+5=5,2+0=2,1+3=4"


def test_every_demonstration_is_right_and_ends_with_its_answer() -> None:
    for row in demonstrations(500, recheck_rate=0.3, seed=1):
        a, b = map(int, row["prompt"].split("=")[0].split("+"))
        assert row["response"].removeprefix(RECHECK) in (str(a + b), f"{columns(a, b)};{a + b}")


def test_the_decision_to_recheck_is_taught_at_its_rate_only() -> None:
    """The extra rows have the token in the prompt, where no loss falls; among the others it is as rare as was asked."""
    rows = demonstrations(4000, recheck_rate=0.03, seed=0)
    decisions = [row for row in rows if RECHECK not in row["prompt"]]
    assert len(decisions) == 4000
    assert mean(row["response"].startswith(RECHECK) for row in decisions) == pytest.approx(0.03, abs=0.01)
    assert all(RECHECK not in row["response"] for row in rows if RECHECK in row["prompt"])


def test_easy_problems_carry_nowhere() -> None:
    rng = random.Random(0)
    for easy_rate, carries in ((1.0, False), (0.0, True)):
        for _ in range(100):
            a, b = problem(rng, easy_rate)
            assert any(int(x) + int(y) > 9 for x, y in zip(str(a), str(b), strict=True)) is carries


def test_same_seed_same_task(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_task(tmp_path / folder, 0.03, num_demonstrations=50, seed=3)
    for file in ("demonstrations.jsonl", "questions.jsonl", "model/config.json", "model/tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert questions(5, 0) != questions(5, 1)


@pytest.mark.proof
def test_the_demo_learns_to_recheck() -> None:
    """`make demo` as a newcomer runs it: below 0.45 at first, above 0.85 over the last four batches."""
    before = set((ROOT / "runs").glob("recheck-demo-*"))
    subprocess.run(["make", "demo"], cwd=ROOT, check=True)
    (run,) = set((ROOT / "runs").glob("recheck-demo-*")) - before
    steps = metrics_of(run)
    assert steps[0]["rollout/reward"] < 0.45
    assert mean(step["rollout/reward"] for step in steps[-4:]) > 0.85
    assert mean(step["rollout/reward/recheck"] for step in steps[-4:]) > 0.5
    assert max(step["train/engine_logprob_diff/max"] for step in steps) < 1e-4
    assert max(abs(step["train/first_update/ppo_kl"]) for step in steps) < 1e-5
    assert max(step["train/first_update/pg_clipfrac"] for step in steps) == 0
    assert (run / "report.html").is_file()
