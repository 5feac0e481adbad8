"""The math reward on labelled pairs of answers, real golds, and hostile strings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rubrics import a_prompt, rubric_of, score, score_all

from conftest import shared_data
from sluice.errors import ConfigError
from sluice.rewards.rubric import Rubric
from sluice.rewards.spec import RewardSpec

MATH = RewardSpec("math", "math", timeout_s=5.0)


def test_agrees_with_labelled_pairs_and_executes_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """531 pairs; some try to run code (`open('marker', 'w')`) or to exhaust time."""
    rows = [json.loads(line) for line in shared_data("math_equivalence.jsonl").read_text().splitlines()]
    texts = [r["pred"] if r["kind"] == "text" else f"The answer is \\boxed{{{r['pred']}}}" for r in rows]
    monkeypatch.chdir(tmp_path)  # where the hostile ones would leave their mark
    start = time.monotonic()
    with rubric_of(RewardSpec("math", "math", timeout_s=2.0), num_workers=2) as rubric:
        trajectories = score_all(rubric, [(a_prompt(row["gold"]), text) for row, text in zip(rows, texts)])
    seconds = time.monotonic() - start
    agreed = sum(t.reward == float(row["equal"]) for t, row in zip(trajectories, rows)) / len(rows)
    unscored = sum(t.outcome != "scored" for t in trajectories)
    print(f"agreement {agreed:.3f} of {len(rows)}, {unscored} without a score, {seconds:.1f} s")
    assert agreed >= 0.93
    assert list(tmp_path.iterdir()) == []
    assert seconds < 60
    assert all(
        t.outcome == "scored" for t, row in zip(trajectories, rows) if "hostile" not in (row["convention"] or "")
    )


@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", "10000000!!", "\\binom{10^9}{10^8}", "2^{2^{2^{2^{2^{2}}}}}"])
def test_answers_that_would_compute_forever_end(answer: str):
    """In 0 or in a time-out, never in a score above 0 and never in a hang."""
    with rubric_of(RewardSpec("math", "math", timeout_s=0.5)) as rubric:
        trajectory = score(rubric, a_prompt("3"), f"\\boxed{{{answer}}}")
        assert score(rubric, a_prompt("3"), "\\boxed{3}").reward == 1.0
    assert trajectory.reward in (0.0, None)
    assert (trajectory.reward is None) == (trajectory.outcome == "timeout")


def test_real_gold_answers_equal_themselves():
    lines = shared_data("gsm8k/train.jsonl").read_text().splitlines()[:200]
    golds = [re.search("#### (.+)", json.loads(line)["answer"])[1] for line in lines]
    with rubric_of(MATH) as rubric:
        right = score_all(rubric, [(a_prompt(gold), f"The answer is \\boxed{{{gold}}}") for gold in golds])
        wrong = score_all(rubric, [(a_prompt(gold), f"The answer is \\boxed{{{gold}1}}") for gold in golds])
    assert [t.reward for t in right] == [1.0] * 200
    assert [t.reward for t in wrong] == [0.0] * 200


@pytest.mark.parametrize(
    ("gold", "text", "reward"),
    [
        ("1/2", "\\boxed{0.5}", 1.0),
        (18, "She makes $18 a day", 1.0),
        ("(1, 2]", "\\boxed{(1,2]}", 1.0),
        ("3", "I do not know", 0.0),
        ("3", "", 0.0),
    ],
)
def test_scores(gold: object, text: str, reward: float):
    with rubric_of(MATH) as rubric:
        trajectory = score(rubric, a_prompt(gold), text)
    assert (trajectory.outcome, trajectory.reward) == ("scored", reward)


@pytest.mark.parametrize("gold", ["", "  ", None])
def test_a_reference_that_is_no_mathematics_is_an_error_not_a_zero(gold: str | None, tmp_path: Path):
    log = tmp_path / "rewards.log"
    with rubric_of(MATH, log=log) as rubric:
        trajectory = score(rubric, a_prompt(gold), "\\boxed{3}")
    assert (trajectory.outcome, trajectory.reward) == ("error", None)
    assert "reward 'math', prompt row-7 (data.jsonl:7)" in trajectory.error
    assert "reference" in trajectory.error
    assert log.read_text() == "", "the library's warnings are silenced"


def test_a_missing_library_is_named_when_the_rubric_is_built(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
    monkeypatch.delitem(sys.modules, "math_verify", raising=False)
    with pytest.raises(ConfigError, match="pip install math-verify"):
        Rubric([MATH], 1)


def test_the_parent_imports_neither_sympy_nor_torch():
    code = (
        "import sys; from sluice.rewards.rubric import Rubric, RewardSpec\n"
        "Rubric([RewardSpec('m', 'math')], 1).close()\n"
        "assert not {'math_verify', 'sympy', 'torch', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
