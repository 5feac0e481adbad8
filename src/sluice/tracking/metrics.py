"""Metrics that know how they are reduced, so that a mean of means cannot arise.

Values may be numbers or 0-d tensors; `+` merges what was measured apart, and `value()` is taken once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mean:
    """A weighted mean, kept as its two sums."""

    total: Any
    weight: Any = 1

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        values = list(values)
        return cls(sum(values), len(values))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> float:
        """nan when nothing was measured: an empty mean is not zero."""
        return float(self.total) / float(self.weight) if float(self.weight) else float("nan")


@dataclass(frozen=True)
class Sum:
    total: Any

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    def value(self) -> float:
        return float(self.total)


@dataclass(frozen=True)
class Max:
    largest: Any

    def __add__(self, other: Max) -> Max:
        return Max(max(self.largest, other.largest))

    def value(self) -> float:
        return float(self.largest)


@dataclass(frozen=True)
class Last:
    """What counts is the newest, e.g. a learning rate."""

    latest: Any

    def __add__(self, other: Last) -> Last:
        return other

    def value(self) -> float:
        return float(self.latest)


@dataclass(frozen=True)
class EffectiveShare:
    """Effective sample size of weights, as a share of their number: (Σ w)² / (n · Σ w²)."""

    count: Any
    total: Any
    total_of_squares: Any

    def __add__(self, other: EffectiveShare) -> EffectiveShare:
        return EffectiveShare(
            self.count + other.count, self.total + other.total, self.total_of_squares + other.total_of_squares
        )

    def value(self) -> float:
        """nan without weights, or when their squares leave the range of floats."""
        below = float(self.count) * float(self.total_of_squares)
        return float(self.total) * float(self.total) / below if below else float("nan")


Metric = Mean | Sum | Max | Last | EffectiveShare


class Metrics(dict[str, Metric]):
    """Metrics by name; `+` merges name by name."""

    def __add__(self, other: Mapping[str, Metric]) -> Metrics:
        merged = Metrics(self)
        for name, metric in other.items():
            merged[name] = merged[name] + metric if name in merged else metric  # type: ignore[operator]
        return merged

    def per_update(self) -> Metrics:
        """What was summed over the micro-batches of one update, to be averaged over updates."""
        return Metrics(
            {name: Mean(metric.total) if isinstance(metric, Sum) else metric for name, metric in self.items()}
        )

    def values_by_name(self) -> dict[str, float]:
        return {name: metric.value() for name, metric in self.items()}
