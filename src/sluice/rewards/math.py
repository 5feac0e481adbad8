"""Mathematical equality of the final answer and the reference, by the library math-verify."""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache
from typing import Any

from sluice.errors import ConfigError, RewardError
from sluice.interfaces import Reward
from sluice.rewards.match import gold_of
from sluice.types import Prompt, Trajectory


def math_reward() -> Reward:
    """1 when the final answer of the response equals the reference as mathematics, else 0.

    An answer that cannot be found, parsed or compared is 0; a reference that cannot be parsed is an error.
    Raises ConfigError when math-verify is not installed. Imports it (and sympy) at the first call only.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError("the reward `math` needs the library math-verify; pip install math-verify")
    return _reward


def warm_up() -> None:
    """Import the library and build its parser tables, so that no sample's time limit pays for them."""
    _equal("\\frac{1}{2}", "so the answer is \\boxed{\\frac{2}{4}}")


def _reward(prompt: Prompt, trajectory: Trajectory) -> float:
    return float(_equal(gold_of(prompt), trajectory.response))


def _equal(gold: str, response: str) -> bool:
    from math_verify import verify

    parsed_gold = _parse_gold(gold)
    # The library's own time limits are signals, and end in "not equal"; ours kill the process and end in no score.
    return verify(parsed_gold, _parse(response), timeout_seconds=None)


@lru_cache(maxsize=1024)  # the samples of a group share it
def _parse_gold(gold: str) -> list[Any]:
    parsed = _parse(gold if "\\boxed" in gold else f"\\boxed{{{gold}}}")
    if not gold.strip() or not parsed:
        raise RewardError(
            f"the reference {gold!r} cannot be read as mathematics; correct the row, or use the reward `match`"
        )
    return parsed


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    # Its only warnings are that its time limits are off, and that one was reached.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse(text, parsing_timeout=None)  # type: ignore[arg-type]  # None is what the library documents for "off"
