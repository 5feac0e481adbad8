"""How long things take and how long responses get, in a simulation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from sluice.types import Sampling

_NORMAL = NormalDist()


@dataclass(frozen=True)
class LogNormal:
    """By its median and its 99th percentile; what lies above `longest` is cut off there."""

    median: float
    p99: float
    longest: float = math.inf

    @property
    def sigma(self) -> float:
        return math.log(self.p99 / self.median) / _NORMAL.inv_cdf(0.99)

    def at(self, share: float) -> float:
        """The value that this share of all is below."""
        return min(self.longest, self.median * math.exp(self.sigma * _NORMAL.inv_cdf(share)))

    def mean(self, power: int = 1) -> float:
        """Of the values to this power."""
        return sum(self.at((i + 0.5) / 4096) ** power for i in range(4096)) / 4096

    def length(self, sampling: Sampling) -> int:
        """Of the response to a request: it depends on its seed alone."""
        return max(1, round(self.at((sampling.seed + 0.5) / 2**63)))


@dataclass(frozen=True)
class Fixed:
    """Always the same."""

    value: float

    def at(self, share: float) -> float:
        return self.value

    def mean(self, power: int = 1) -> float:
        return self.value**power

    def length(self, sampling: Sampling) -> int:
        return int(self.value)


Distribution = LogNormal | Fixed
