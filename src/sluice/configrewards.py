"""The sections of the config that say what a response is worth."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from sluice.configbase import DottedPath, Section


class RewardSection(Section):
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor in the sum; 0 logs the part without rewarding it."""
    timeout_s: Annotated[float, Field(gt=0, le=86400)] = 10.0
    """After this the process that computes it is killed and the sample has no score."""


class MathReward(RewardSection):
    name: Literal["math"] = "math"
    """1 when the final answer equals the reference as mathematics (library math-verify), else 0."""
    label: str = "math"
    """Name of the part in metrics and ledger."""


class MatchReward(RewardSection):
    name: Literal["match"] = "match"
    """1 when the text matches, else 0."""
    pattern: str | None = None
    """Regular expression searched in the response; with a reference its first group must equal it. Left out, the whole response must."""
    against: Literal["reference", "nothing"] = "reference"
    """nothing: that the pattern is found is enough."""
    take: Literal["first", "last"] = "last"
    """Which match counts when there are several."""
    label: str = "match"
    """Name of the part in metrics and ledger."""


class FormatReward(RewardSection):
    name: Literal["format"] = "format"
    """1 when the whole response matches a pattern, else 0."""
    pattern: str
    """Regular expression (dot matches newlines), e.g. `<think>.*</think>.*`."""
    label: str = "format"
    """Name of the part in metrics and ledger."""


class CustomReward(RewardSection):
    name: DottedPath
    """`module:function` with `(prompt, trajectory) -> float`, or a dict of named floats."""
    label: str | None = None
    """Name of the part in metrics and ledger; left out, the function's."""


def _reward_tag(value: Any) -> str:
    name: Any = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)  # pyright: ignore
    return name if name in ("math", "match", "format") else "module:function"


AnyReward = Annotated[
    Annotated[MathReward, Tag("math")]
    | Annotated[MatchReward, Tag("match")]
    | Annotated[FormatReward, Tag("format")]
    | Annotated[CustomReward, Tag("module:function")],
    Discriminator(_reward_tag),
]
