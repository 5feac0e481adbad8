"""Rewards that are one regular expression."""

from __future__ import annotations

import pytest
from rubrics import a_prompt, an_answer

from sluice.errors import RewardError
from sluice.rewards.match import format_reward, match_reward


@pytest.mark.parametrize(
    ("settings", "reference", "text", "reward"),
    [
        ({"pattern": None}, "7", "  7\n", 1.0),
        ({"pattern": None}, 7, "7", 1.0),
        ({"pattern": None}, "7", "is 7", 0.0),
        ({"pattern": r"#### (\S+)"}, "7", "#### 6 no, #### 7", 1.0),
        ({"pattern": r"#### (\S+)", "take": "first"}, "7", "#### 6 no, #### 7", 0.0),
        ({"pattern": r"#### (\S+)", "take": "first"}, "6", "#### 6 no, #### 7", 1.0),
        ({"pattern": r"\d+"}, " 42 ", "it is 42.", 1.0),
        ({"pattern": r"(a)(b)"}, "a", "ab", 1.0),
        ({"pattern": r"x|(y)"}, "y", "x", 0.0),
        ({"pattern": r"\d+"}, "4", "it is 42.", 0.0),
        ({"pattern": r"\d+"}, "", "no number", 0.0),
        ({"pattern": r"\d", "against": "nothing"}, None, "a 1", 1.0),
        ({"pattern": r"\d", "against": "nothing"}, None, "a", 0.0),
    ],
)
def test_match(settings: dict[str, str], reference: object, text: str, reward: float):
    assert match_reward(**settings)(a_prompt(reference), an_answer(text)) == reward


def test_a_missing_reference_is_an_error_not_an_answer():
    """The text `None` must not equal a reference that is not there."""
    with pytest.raises(RewardError, match=r"data\.reference"):
        match_reward(None)(a_prompt(None), an_answer("None"))


@pytest.mark.parametrize(
    ("text", "reward"),
    [("<think>a\nb</think>c", 1.0), ("<think>a", 0.0), (" <think>a</think>", 0.0), ("<think></think>", 1.0)],
)
def test_format_takes_the_whole_response_and_its_lines(text: str, reward: float):
    assert format_reward("<think>.*</think>.*")(a_prompt(), an_answer(text)) == reward
