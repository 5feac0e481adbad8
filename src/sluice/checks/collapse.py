"""How a policy goes bad while every number is finite: the latest steps beside the run's own first. Each check tells the
evidence, or ""."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

WINDOW = 5
"""Steps that are averaged, at the start of the run and at its present end; before twice as many nothing is said."""


@dataclass
class Trend:
    """A metric at the start of the run and now."""

    first: list[float] = field(default_factory=list[float])
    latest: list[float] = field(default_factory=list[float])

    def add(self, value: float) -> None:
        if len(self.first) < WINDOW:
            self.first.append(value)
        else:
            self.latest = [*self.latest, value][-WINDOW:]

    @property
    def is_known(self) -> bool:
        return len(self.latest) == WINDOW

    @property
    def before(self) -> float:
        return fmean(self.first)

    @property
    def now(self) -> float:
        return fmean(self.latest)

    def __str__(self) -> str:
        return (
            f"{self.before:.3g} in the mean of the first {WINDOW} steps and {self.now:.3g} in that of the last {WINDOW}"
        )


def entropy(entropy: Trend, reward: Trend) -> str:
    """Below a tenth of what it was, or above three times that and half a nat more, while the reward has not risen.

    A policy that learns grows certain, so a fall alone says nothing.
    """
    fallen = entropy.now < 0.1 * entropy.before
    risen = entropy.now > max(3 * entropy.before, entropy.before + 0.5)
    return f"entropy {entropy}, reward {reward}" if (fallen or risen) and reward.now <= reward.before else ""


def response_length(length: Trend, cut_off: Trend, reward: Trend) -> str:
    """Half of the completions run into the limit and did not at first; or a quarter of the length is left and no more reward."""
    if cut_off.now > 0.5 and cut_off.now > cut_off.before + 0.25:
        return f"share of completions that ran into rollout.max_new_tokens {cut_off}, response length {length}"
    if length.now < 0.25 * length.before and reward.now <= reward.before:
        return f"response length {length}, reward {reward}"
    return ""


def repetition(repetition: Trend) -> str:
    """More than half of the 4-grams of a completion have been in it before, and at first it was not so."""
    collapsed = repetition.now > 0.5 and repetition.now > repetition.before + 0.25
    return f"share of 4-grams that repeat an earlier one of their completion {repetition}" if collapsed else ""


def equal_rewards(equal: Trend, reward: Trend) -> str:
    """In nine groups of ten all rewards are equal, so that hardly any carries a signal."""
    if equal.now <= 0.9:
        return ""
    return (
        f"in {equal.now:.0%} of the groups of the last {WINDOW} steps all rewards are equal, and such a group has no gradient "
        f"(reward {reward})"
    )


CHECKS = {
    entropy: ("train/entropy", "rollout/reward"),
    response_length: ("rollout/response_len/mean", "rollout/finish/length", "rollout/reward"),
    repetition: ("rollout/repetition",),
    equal_rewards: ("rollout/equal_reward_groups", "rollout/reward"),
}
"""And the metrics whose trends each looks at."""
METRICS = sorted({metric for metrics in CHECKS.values() for metric in metrics})


def follow(trends: dict[str, Trend], metrics: Mapping[str, float]) -> None:
    """Take in the metrics of a step; one that was not measured in it is left out."""
    for name in METRICS:
        value = metrics.get(name, math.nan)
        if math.isfinite(value):
            trends.setdefault(name, Trend()).add(value)
