"""Responses that are written from the pattern of a `match` reward, and the patterns that are too rich for that."""

from __future__ import annotations

import pytest

from sluice.preflight.gold import evenly_spread
from sluice.preflight.pattern import response_from
from sluice.rewards.match import match_reward
from sluice.types import Completion, Prompt, Trajectory, Turn

SIMPLE = {
    r"(\d+)$": "42",
    r"#### (.+)": "#### 42",
    r"answer is (\d+)": "answer is 42",
    r"^answer:\s*(-?\d+(?:\.\d+)?)\s*$": "answer:42",
    r"<answer>(.*?)</answer>": "<answer>42</answer>",
    r"\\boxed\{([^}]*)\}": "\\boxed{42}",
    r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}": "\\boxed{42}",
    r".*so (?P<answer>\d+)\.?": "so 42",
    r"is\s+([)(0-9]+)": "is 42",
    r"colou?r (\w+)": "color 42",
    r"\d+": "42",
}
RICH = [
    r"(a|b) (\d+)",
    r"[Aa]nswer: (\d+)",
    r"(?<=is )(\d+)",
    r"\w+ (\d+)",
    r"a{3}(\d+)",
    r"(\d+)+",
    r"yes|no (\d+)",
    r"(?i)x(\d)",
]


@pytest.mark.parametrize("pattern", SIMPLE)
def test_a_simple_pattern_gives_a_response_that_it_finds_the_reference_in(pattern: str):
    response = response_from(pattern, "42")
    assert response == SIMPLE[pattern]
    completion = Completion([1], [0.0], "stop", [0], 1.0, response)
    assert match_reward(pattern)(Prompt("p", [], "42"), Trajectory([Turn([1], completion)])) == 1.0


@pytest.mark.parametrize("pattern", RICH)
def test_of_a_rich_one_nothing_is_made_up(pattern: str):
    assert response_from(pattern, "42") is None


def test_rows_are_evenly_spread():
    assert evenly_spread(3, 500) == [0, 1, 2]
    assert evenly_spread(7473, 3) == [0, 3736, 7472]
    assert evenly_spread(9, 1) == [0]
    assert len(set(evenly_spread(1000, 999))) == 999
