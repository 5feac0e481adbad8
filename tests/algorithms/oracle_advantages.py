"""Advantages as their papers write them, on plain lists of floats.

Sums are `math.fsum`, so that an oracle's own rounding never stands in the way of a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Baseline = Callable[[Sequence[float]], list[float]]

# among the answers to one prompt


def raw(rewards: Sequence[float]) -> list[float]:
    """Williams 1992 without a baseline."""
    return list(rewards)


def centre(rewards: Sequence[float]) -> list[float]:
    """Dr. GRPO, arXiv 2503.20783, section 3.2: r_i - mean."""
    if nothing_to_compare(rewards):
        return [0.0] * len(rewards)
    average = math.fsum(rewards) / len(rewards)
    return [r - average for r in rewards]


def z_scores(rewards: Sequence[float], eps: float = 1e-6, ddof: int = 1) -> list[float]:
    """GRPO, arXiv 2402.03300, section 4.1.2: (r_i - mean) / std, of a sample: over n - 1. No spread, no advantage."""
    if nothing_to_compare(rewards):
        return [0.0] * len(rewards)
    return [c / (_std(rewards, ddof) + eps) for c in centre(rewards)]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """RLOO, arXiv 2402.14740, eq. 8: r_i - mean of the others."""
    if nothing_to_compare(rewards):
        return [0.0] * len(rewards)
    return [r - math.fsum([*rewards[:i], *rewards[i + 1 :]]) / (len(rewards) - 1) for i, r in enumerate(rewards)]


def nothing_to_compare(rewards: Sequence[float]) -> bool:
    return all(r == rewards[0] for r in rewards)


def by_group(baseline: Baseline, rewards: Sequence[float], groups: Sequence[int]) -> list[float]:
    """Each group by itself, and back in the order of the samples."""
    out = [math.nan] * len(rewards)
    for group in set(groups):
        members = [i for i in range(len(rewards)) if groups[i] == group]
        for i, advantage in zip(members, baseline([rewards[i] for i in members]), strict=True):
            out[i] = advantage
    return out


# among all answers of a batch


def over_batch_std(advantages: Sequence[float], eps: float = 1e-6, ddof: int = 1) -> list[float]:
    """ScaleRL, arXiv 2510.13786, section 3.2: by the spread of the advantages of the whole batch."""
    if len(advantages) <= ddof:
        return [0.0] * len(advantages)
    return [a / (_std(advantages, ddof) + eps) for a in advantages]


def whiten(values: Sequence[float], counts: Sequence[float], ddof: int = 1) -> list[float]:
    """REINFORCE++, arXiv 2501.03262: (A - μ) / σ over the batch, each value as many times as it has tokens; σ² + 1e-8."""
    n = math.fsum(counts)
    average = math.fsum(c * v for v, c in zip(values, counts, strict=True)) / n
    squares = math.fsum(c * (v - average) ** 2 for v, c in zip(values, counts, strict=True))
    return [(v - average) / math.sqrt(squares / (n - ddof) + 1e-8) for v in values]


def _std(values: Sequence[float], ddof: int) -> float:
    average = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - average) ** 2 for v in values) / (len(values) - ddof))


# along one answer


def td_errors(rewards: Sequence[float], values: Sequence[float], gamma: float) -> list[float]:
    """δ_t = r_t + γ·V_t+1 - V_t, and nothing is worth anything after the end."""
    after = [*values[1:], 0.0]
    return [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]


def gae(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> list[float]:
    """GAE, arXiv 1506.02438, eq. 16: Σ_l (γλ)^l δ_t+l, each sum by itself."""
    return discounted(td_errors(rewards, values, gamma), gamma * lam)


def discounted(values: Sequence[float], factor: float) -> list[float]:
    """Σ_l factor^l x_t+l, each sum by itself."""
    n = len(values)
    return [math.fsum(factor ** (i - t) * values[i] for i in range(t, n)) for t in range(n)]


def with_kl_to_come(reward: float, kl: Sequence[float], coef: float) -> list[float]:
    """REINFORCE++, arXiv 2501.03262: A_t = r - β Σ_i≥t KL_i."""
    return [reward - coef * math.fsum(kl[t:]) for t in range(len(kl))]


def with_kl_per_token(reward: float, kl: Sequence[float], coef: float) -> list[float]:
    """InstructGPT's PPO, arXiv 2203.02155, eq. 2 spread over tokens: -β·KL_t at each, and the score at the last."""
    return [-coef * k + (reward if t == len(kl) - 1 else 0.0) for t, k in enumerate(kl)]


def with_kl_of_the_answer(reward: float, kl: Sequence[float], coef: float) -> float:
    """RLOO, arXiv 2402.14740, eq. 1 and 2: R = r - β·log(π/π_ref) of the whole answer."""
    return reward - coef * math.fsum(kl)
