"""A rubric gives right scores, and an error never becomes one. Real processes throughout."""

from __future__ import annotations

import asyncio
import os
import re
import time
from pathlib import Path

import pytest
from rubrics import a_prompt, an_answer, rubric_of, score, score_all, users

from sluice.errors import ConfigError, RewardError
from sluice.rewards import pool
from sluice.rewards.rubric import Rubric
from sluice.rewards.spec import RewardSpec


def test_parts_are_weighted_and_logged_unweighted():
    """Dict parts count with their sum, a part of weight 0 is logged only."""
    specs = [users("length", "length", 0.5), users("named", "named", 2.0), users("length", "seen", 0.0)]
    with rubric_of(*specs) as rubric:
        trajectory = score(rubric, a_prompt(), "four five")
    assert trajectory.outcome == "scored"
    assert trajectory.reward == 0.5 * 9 + 2.0 * (2 + 1) + 0.0
    assert trajectory.reward_parts == {"length": 9.0, "named/words": 2.0, "named/bonus": 1.0, "seen": 9.0}
    assert trajectory.error == ""


def test_built_in_rewards_score_together():
    specs = [
        RewardSpec("math", "math"),
        RewardSpec("exact", "match", arguments={"pattern": r"boxed\{(.*)\}"}),
        RewardSpec("form", "format", 0.1, arguments={"pattern": "<think>.*</think>.*"}),
    ]
    with rubric_of(*specs) as rubric:
        trajectory = score(rubric, a_prompt("0.5"), "<think>\nhalf\n</think> \\boxed{1/2}")
    assert trajectory.reward_parts == {"math": 1.0, "exact": 0.0, "form": 1.0}
    assert trajectory.reward == pytest.approx(1.1)


def test_an_error_names_reward_prompt_and_the_users_line():
    with rubric_of(users("length", "first"), users("raises", "parser")) as rubric:
        trajectory = score(rubric, a_prompt(), "no json")
        assert score(rubric, a_prompt(), "12").reward == 14.0, "the process goes on after an error"
    line = next(i for i, text in enumerate(_source(), 1) if "json.loads" in text)
    assert trajectory.outcome == "error"
    assert "reward 'parser', prompt row-7 (data.jsonl:7): JSONDecodeError: Expecting value" in trajectory.error
    assert trajectory.error.endswith(f"users_rewards.py:{line}")
    assert trajectory.reward is None
    assert trajectory.reward_parts == {}


WRONG_VALUES = ["float('nan')", "float('inf')", "-float('inf')", "10**400", "'1.0'", "None", "[1.0]", "{}", "1j"]
WRONG_DICTS = ["{'a': 1.0, 'b': None}", "{'a': float('nan')}", "{3: 1.0}", "{'a': 1e308, 'b': 1e308}"]
FAILURES = ["1 / 0", "open('/nowhere')", "sys.exit()", "exec('raise KeyboardInterrupt')", "exec('def f(): f()\\nf()')"]


@pytest.fixture(scope="module")
def returning():
    with rubric_of(users("returns", "part")) as rubric:
        yield rubric


@pytest.mark.parametrize("value", WRONG_VALUES + WRONG_DICTS + FAILURES)
def test_what_is_no_finite_number_is_an_error_and_never_a_score(returning: Rubric, value: str):
    trajectory = score(returning, a_prompt(value=value))
    assert (trajectory.outcome, trajectory.reward, trajectory.reward_parts) == ("error", None, {})
    assert "row-7" in trajectory.error
    if value not in FAILURES and "1e308" not in value:
        assert "returned" in trajectory.error, "the value is blamed, not the sum"


@pytest.mark.parametrize(
    ("value", "reward"), [("True", 1.0), ("0", 0.0), ("-2.5", -2.5), ("__import__('numpy').float32(0.5)", 0.5)]
)
def test_every_real_number_is_a_score(returning: Rubric, value: str, reward: float):
    trajectory = score(returning, a_prompt(value=value))
    assert (trajectory.outcome, trajectory.reward) == ("scored", reward), trajectory.error


def test_an_overflowing_sum_is_an_error():
    with rubric_of(users("returns", "part", weight=1e300)) as rubric:
        trajectory = score(rubric, a_prompt(value="1e300"))
    assert (trajectory.outcome, trajectory.reward) == ("error", None)


@pytest.mark.parametrize("function", ["leaves", "raises_badly"])
def test_odd_exceptions_are_errors_of_the_sample_only(function: str):
    with rubric_of(users(function)) as rubric:
        trajectories = score_all(rubric, [(a_prompt(), "")] * 2)
    assert [(t.outcome, t.reward) for t in trajectories] == [("error", None)] * 2
    assert ("SystemExit" if function == "leaves" else "BadMessage") in trajectories[0].error


def test_a_prompt_that_cannot_be_sent_is_an_error():
    with rubric_of(users("length")) as rubric:
        trajectory = score(rubric, a_prompt(function=lambda: 0))
    assert (trajectory.outcome, trajectory.reward) == ("error", None)
    assert "cannot be sent to a reward process" in trajectory.error


def test_a_reward_cannot_change_what_the_next_one_sees():
    with rubric_of(users("vandal", "vandal"), users("length", "length")) as rubric:
        trajectory = score(rubric, a_prompt(), "abc")
    assert trajectory.reward_parts["length"] == 3.0
    assert len(trajectory.turns) == 1


def test_a_reward_that_never_returns_times_out_alone():
    """Within the limit + 2 s; samples before and after it are scored, and the error names the part."""
    with rubric_of(users("length", "quick"), users("hangs", "slow", timeout_s=0.5)) as rubric:
        asyncio.run(rubric.start())
        start = time.monotonic()
        stuck = score(rubric, a_prompt(), "hang")
        assert time.monotonic() - start < 0.5 + 2.0
        before, middle, after = score_all(rubric, [(a_prompt(), text) for text in ("a", "hang", "b")])
    for trajectory in (stuck, middle):
        assert (trajectory.outcome, trajectory.reward, trajectory.reward_parts) == ("timeout", None, {})
        assert trajectory.error.startswith("reward 'slow', prompt row-7 (data.jsonl:7): did not return within 0.5 s")
    assert (before.reward, after.reward) == (2.0, 2.0)


def test_a_catastrophic_pattern_times_out():
    """It holds the interpreter lock in C, where no exception or thread gets in."""
    with rubric_of(RewardSpec("form", "format", timeout_s=0.5, arguments={"pattern": "(a+)+$"})) as rubric:
        asyncio.run(rubric.start())
        start = time.monotonic()
        trajectory = score(rubric, a_prompt(), "a" * 50 + "b")
        assert time.monotonic() - start < 0.5 + 2.0
        assert (trajectory.outcome, trajectory.reward) == ("timeout", None)
        assert score(rubric, a_prompt(), "aaa").reward == 1.0


def test_imports_do_not_count_against_the_time_limit():
    """sympy takes longer to import than this limit; and the parent never imports it."""
    with rubric_of(RewardSpec("math", "math", timeout_s=0.2)) as rubric:
        assert score(rubric, a_prompt("\\frac{3}{4}"), "so \\boxed{0.75}").reward == 1.0


def test_starting_while_scoring_uses_no_process_twice_at_once():
    async def run() -> list[str]:
        trajectories = [an_answer("") for _ in range(20)]
        await asyncio.gather(*(rubric.score(a_prompt(), t) for t in trajectories), rubric.start(), rubric.start())
        return [t.outcome for t in trajectories]

    with rubric_of(users("named"), num_workers=2) as rubric:
        assert set(asyncio.run(run())) == {"scored"}


def test_processes_are_light_single_threaded_and_used_side_by_side():
    with rubric_of(users("where", "at"), num_workers=2) as rubric:
        trajectories = score_all(rubric, [(a_prompt(), "")] * 40)
    parts = [t.reward_parts for t in trajectories]
    assert len({p["at/pid"] for p in parts}) == 2
    assert {(p["at/threads"], p["at/torch"]) for p in parts} == {(1.0, 0.0)}


def test_what_rewards_print_goes_to_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    log = tmp_path / "rewards.log"
    with rubric_of(users("prints"), log=log) as rubric:
        assert score(rubric, a_prompt()).reward == 1.0
    assert log.read_text() == "seen by the log\nand this\n"
    assert capfd.readouterr() == ("", "")


ONLY_IN_A_WORKER = "import os\nif os.getpid() != {}:\n    {}\ndef reward(prompt, trajectory): return 1.0\n"


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        ("raise OSError('no device')", r"importing fragile\d raised OSError: no device at .*fragile\d\.py:3"),
        ("import os; os._exit(9)", r"ended with exit code 9; see .*rewards\.log"),
        ("import time; time.sleep(60)", r"imports did not end within 1 s"),
    ],
)
def test_a_process_that_cannot_start_is_reported(
    deed: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    """At `start`, and without it as an error of the sample; never a hang."""
    name = f"fragile{len(deed) % 10}"
    (tmp_path / f"{name}.py").write_text(ONLY_IN_A_WORKER.format(os.getpid(), deed))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pool, "START_LIMIT_S", 1.0)
    spec = RewardSpec("part", f"{name}:reward")
    with rubric_of(spec, num_workers=2, log=tmp_path / "rewards.log") as rubric:
        trajectory = score(rubric, a_prompt())
        assert (trajectory.outcome, trajectory.reward) == ("error", None)
        assert re.search(said, trajectory.error)
        with pytest.raises(RewardError, match=said):
            asyncio.run(rubric.start())


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("match", {"pattern": "(", "against": "nothing"}, r"'part'.*'\(' does not compile"),
        ("format", {"pattern": "[a"}, r"'part'.*'\[a' does not compile"),
        ("users_rewards:asynchronous", {}, "is an `async def`; write a plain `def`"),
        ("users_rewards:three", {}, r"takes \(a, b, c\); it is called with \(prompt, trajectory\)"),
        ("users_rewards:lenght", {}, "did you mean users_rewards:length"),
    ],
)
def test_what_cannot_work_is_refused_when_the_rubric_is_built(kind: str, arguments: dict[str, str], said: str):
    with pytest.raises(ConfigError, match=said):
        Rubric([RewardSpec("part", kind, arguments=arguments)], 1)


@pytest.mark.parametrize("labels", [[], ["same", "same"]])
def test_a_rubric_needs_parts_with_different_labels(labels: list[str]):
    with pytest.raises(ConfigError, match="each its own label"):
        Rubric([users("length", label) for label in labels], 1)


def test_closing_while_scoring_gives_no_score():
    async def run() -> tuple[object, float]:
        with rubric_of(users("hangs", timeout_s=60)) as rubric:
            await rubric.start()
            trajectory = an_answer("hang")
            task = asyncio.create_task(rubric.score(a_prompt(), trajectory))
            await asyncio.sleep(0.2)
        start = time.monotonic()
        await asyncio.wait([task], timeout=10)
        assert task.done()
        return trajectory.reward, time.monotonic() - start

    reward, waited = asyncio.run(run())
    assert reward is None
    assert waited < 2.0


def test_a_step_of_tiny_rewards_costs_little():
    """256 samples through one process; the bound leaves room for a busy machine."""
    prompt, text = a_prompt("12", note="x" * 500), "word " * 100
    with rubric_of(RewardSpec("match", "match", arguments={"pattern": "x"})) as rubric:
        asyncio.run(rubric.start())
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            trajectories = score_all(rubric, [(prompt, text)] * 256)
            seconds.append(time.perf_counter() - start)
            assert {t.outcome for t in trajectories} == {"scored"}
    print(f"256 tiny rewards on one process: {min(seconds) * 1000:.0f} ms, {256 / min(seconds):.0f}/s")
    assert min(seconds) < 0.3


def _source() -> list[str]:
    return (Path(__file__).parent / "users_rewards.py").read_text().splitlines()
