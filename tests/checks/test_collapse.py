"""Detectors of collapse speak when a run goes bad, and not of one that learns."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sluice.checks.collapse import CHECKS, WINDOW, Trend, follow
from sluice.rollout.metrics import repetition
from sluice.types import Completion, Group, Prompt, Trajectory, Turn

SOUND = {
    "rollout/reward": lambda t: 0.2 + 0.7 * t,
    "rollout/response_len/mean": lambda t: 5 + 21 * t,
    "rollout/finish/length": lambda t: 0.1 * t,
    "rollout/repetition": lambda t: 0.02 + 0.3 * t,
    "rollout/equal_reward_groups": lambda t: 0.5 + 0.3 * t,
    "train/entropy": lambda t: 0.46 * 0.03**t,
}
"""Much like the recheck demo; t goes from 0 to 1."""


def told(num_steps: int = 4 * WINDOW, **changes: Callable[[float], float]) -> dict[str, str]:
    """What each check says after a run with these metrics; names without their first part."""
    trends: dict[str, Trend] = {}
    curves = {name: changes.get(name.split("/")[1], curve) for name, curve in SOUND.items()}
    for step in range(num_steps):
        follow(trends, {name: curve(step / (num_steps - 1)) for name, curve in curves.items()})
    return {
        check.__name__: check(*(trends[name] for name in names))
        for check, names in CHECKS.items()
        if all(trends[name].is_known for name in names)
    }


def failing(**changes: Callable[[float], float]) -> list[str]:
    return [name for name, why in told(**changes).items() if why]


def no_reward(t: float) -> float:
    return 0.3 - 0.1 * t


def test_a_run_that_learns_is_left_alone():
    assert set(told().values()) == {""}
    assert len(told()) == 4


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("entropy", {"reward": no_reward}),
        ("entropy", {"reward": no_reward, "entropy": lambda t: 0.4 + 3 * t}),
        ("response_length", {"finish": lambda t: 0.1 + 0.8 * t}),
        ("response_length", {"reward": no_reward, "entropy": lambda t: 0.4, "response_len": lambda t: 100 - 95 * t}),
        ("repetition", {"repetition": lambda t: 0.05 + 0.8 * t}),
        ("equal_rewards", {"equal_reward_groups": lambda t: 0.4 + 0.6 * t**0.1}),
    ],
)
def test_a_collapse_is_told_with_its_evidence(name: str, changes: dict[str, Callable[[float], float]]):
    assert failing(**changes) == [name]
    assert f"in the mean of the first {WINDOW} steps and " in told(**changes)[name]


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": no_reward, "entropy": lambda t: 0.4 - 0.3 * t},
        {"reward": no_reward, "entropy": lambda t: 0.01 + 0.1 * t},
        {"response_len": lambda t: 100 - 95 * t},
        {"finish": lambda t: 0.6 + 0.1 * t},
        {"repetition": lambda t: 0.6 + 0.1 * t},
    ],
    ids=[
        "a slow fall",
        "a rise from almost nothing",
        "shorter for more reward",
        "cut off from the start",
        "repetitive",
    ],
)
def test_what_is_no_collapse(changes: dict[str, Callable[[float], float]]):
    assert failing(**changes) == []


def test_nothing_is_said_of_a_short_run_or_of_what_is_not_measured():
    assert told(2 * WINDOW - 1) == {}
    trends: dict[str, Trend] = {}
    follow(trends, {"train/entropy": float("nan"), "perf/step_s": 1.0})
    assert trends == {}


def share_of_repeats(*completions: list[int]) -> float:
    turns = [Turn([1], Completion(ids, [0.0] * len(ids), "stop", [0] * len(ids), 1.0)) for ids in completions]
    return repetition([Group(0, Prompt("p", []), [Trajectory([turn]) for turn in turns])]).value()


def test_repetition_counts_4_grams_of_the_same_completion():
    assert share_of_repeats([1, 2, 3, 4, 5, 6]) == 0
    assert share_of_repeats([7] * 10) == pytest.approx(6 / 7)
    assert share_of_repeats([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert share_of_repeats([1, 2, 3, 4], [1, 2, 3, 4]) == 0
    assert share_of_repeats([1, 2, 3, 4], [5, 6], [], [3, 3, 3, 3, 3]) == pytest.approx(1 / 3)
    assert share_of_repeats([1, 2], [3]) != share_of_repeats([1, 2], [3])  # nan: there was none
