"""What one part of the reward is, as plain data that goes to the processes that compute it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sluice.errors import ConfigError
from sluice.hooks import resolve
from sluice.interfaces import Reward
from sluice.rewards.match import format_reward, match_reward
from sluice.rewards.math import math_reward


@dataclass(frozen=True)
class RewardSpec:
    """One part of a rubric."""

    label: str
    """Name of the part in metrics and ledger."""
    kind: str
    """`math`, `match`, `format`, or `module:function` of the user's."""
    weight: float = 1.0
    """Factor in the sum; 0 logs the part without rewarding it."""
    timeout_s: float = 10.0
    """Hard limit for one sample."""
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Keyword arguments of `match_reward` or `format_reward`."""


def build(spec: RewardSpec) -> Reward:
    """The function that computes the part. Raises ConfigError when it cannot be had or cannot work."""
    try:
        match spec.kind:
            case "math":
                return math_reward(**spec.arguments)
            case "match":
                return match_reward(**spec.arguments)
            case "format":
                return format_reward(**spec.arguments)
            case _:
                return resolve(spec.kind, ("prompt", "trajectory"))
    except ConfigError as error:
        raise ConfigError(f"reward {spec.label!r}: {error}") from error
