"""Rewards that are one regular expression."""

from __future__ import annotations

import re
from typing import Literal

from sluice.errors import ConfigError, RewardError
from sluice.interfaces import Reward
from sluice.types import Prompt, Trajectory


def match_reward(
    pattern: str | None, against: Literal["reference", "nothing"] = "reference", take: Literal["first", "last"] = "last"
) -> Reward:
    """1 when the text that `pattern` finds in the response equals the reference; against nothing, when it finds any.

    The text is the pattern's first group if it has groups, else the whole match; without a pattern it is the whole
    response. Both sides are stripped of white space. Raises ConfigError when the pattern does not compile.
    """
    regex = None if pattern is None else _compile(pattern)

    def reward(prompt: Prompt, trajectory: Trajectory) -> float:
        found = trajectory.response if regex is None else _find(regex, trajectory.response, take)
        if against == "nothing":
            return float(found is not None)
        return float(found is not None and found.strip() == gold_of(prompt).strip())

    return reward


def format_reward(pattern: str) -> Reward:
    """1 when the whole response matches (dot matches newlines). Raises ConfigError if the pattern does not compile."""
    regex = _compile(pattern, re.DOTALL)

    def reward(prompt: Prompt, trajectory: Trajectory) -> float:
        return float(regex.fullmatch(trajectory.response) is not None)

    return reward


def gold_of(prompt: Prompt) -> str:
    """The reference as text. Raises RewardError when the prompt has none: `None` must not become an answer to equal."""
    if prompt.reference is None:
        raise RewardError("the prompt has no reference to compare with; name its column in data.reference")
    return str(prompt.reference)


def _find(regex: re.Pattern[str], text: str, take: str) -> str | None:
    matches = list(regex.finditer(text))
    if not matches:
        return None
    found = matches[0 if take == "first" else -1]
    return (found[1] or "") if regex.groups else found[0]


def _compile(pattern: str, flags: int = 0) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ConfigError(f"the pattern {pattern!r} does not compile: {error}; correct it") from error
