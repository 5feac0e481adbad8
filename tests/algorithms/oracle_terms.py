"""What may stand beside a policy's own term: KL, entropy, corrections for the sampler, and the critic's loss.

As in `oracle`: from the papers, one token after the other, and plain floats where the gradient stops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from oracle import Aggregate, Response, Term, clip, mean, sg
from torch import Tensor

# KL to a reference


def k1(logprob: Tensor, ref: float) -> Tensor:
    """Schulman 2020, Approximating KL Divergence, for KL(π, π_ref) with samples of π: unbiased, and of either sign."""
    return logprob - ref


def k2(logprob: Tensor, ref: float) -> Tensor:
    return (logprob - ref) ** 2 / 2


def k3(logprob: Tensor, ref: float) -> Tensor:
    """GRPO, arXiv 2402.03300, eq. 4: π_ref/π - log(π_ref/π) - 1."""
    return torch.exp(ref - logprob) - (ref - logprob) - 1


def straight_through(estimator: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, float], Tensor]:
    """The value of one estimator with the gradient of k2, which is the gradient of the KL: arXiv 2510.01555, section 4."""
    return lambda logprob, ref: sg(estimator(logprob, ref)) + k2(logprob, ref) - sg(k2(logprob, ref))


KL = {"k1": k1, "k2": k2, "k3": k3, "k1_st": straight_through(k1), "k3_st": straight_through(k3)}


# between the sampler and the trainer


def exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def importance(o: Response, t: int, level: str) -> float:
    """π_θold / π_sampler: of the token; of the response, a product; or of the response per token, a geometric mean."""
    logs = [old - engine for old, engine in zip(o.old_logprobs, o.engine_logprobs, strict=True)]
    return exp({"token": logs[t], "sequence": sum(logs), "geometric": mean(logs)}[level])


def tis(w: float, low: float | None, high: float) -> float:
    """Truncated importance sampling: IMPALA's ρ, arXiv 1802.01561, section 4.1; Yao et al. 2025 for language models."""
    return min(w, high)


def mis(w: float, low: float | None, high: float) -> float:
    """Masked importance sampling: Liu et al. 2025, When Speed Kills Stability."""
    return w if (low is None or w >= low) and w <= high else 0.0


def icepop(w: float, low: float | None, high: float) -> float:
    """Every Step Evolves, arXiv 2510.18855: M(k) = k in [α, β] and 0 elsewhere."""
    assert low is not None
    return w if low <= w <= high else 0.0


CORRECTIONS = {"tis": tis, "mis": mis, "icepop": icepop}


def accepted(o: Response, level: str, low: float, high: float) -> bool:
    """Whether a whole response stays, by its ratio between trainer and sampler."""
    return low <= importance(o, 0, level) <= high


def effective_sample_size(weights: Sequence[float]) -> float:
    """Kish 1965, as a share: (Σ w)² / Σ w² / n, 1 where all weigh the same and 1/n where one outweighs all."""
    return sum(weights) ** 2 / sum(w * w for w in weights) / len(weights)


# objectives put together


def objective(
    responses: Sequence[Response],
    term: Term,
    aggregate: Aggregate,
    *,
    correction: Callable[[Response, int], float] | None = None,
    kl: Callable[[Tensor, float], Tensor] | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
) -> Any:
    """IcePop, arXiv 2510.18855: the correction inside the mean, before the policy's term and not before the KL.

    GRPO, arXiv 2402.03300, eq. 3: -β·KL inside the same mean. PPO, arXiv 1707.06347, eq. 9: + c·entropy.
    """

    def whole(o: Response, t: int) -> Any:
        value = term(o, t) * (1.0 if correction is None else correction(o, t))
        if kl is not None:
            value = value - kl_coef * kl(o.logprobs[t], o.ref_logprobs[t])
        return value + (entropy_coef * o.entropies[t] if entropy_coef else 0.0)

    return aggregate(responses, whole)


# the critic


def value_loss(value: Tensor, old_value: float, target: float, clip_range: float | None) -> Any:
    """(V - R)² / 2; clipped as in the code of PPO's authors: the worse of V and of a V that stayed near the old one.

    Huang et al. 2022, The 37 Implementation Details of PPO, detail 9.
    """
    free = (value - target) ** 2 / 2
    if clip_range is None:
        return free
    near = (clip(value, old_value - clip_range, old_value + clip_range) - target) ** 2 / 2
    return max(free, near)


def explained_variance(values: Sequence[float], returns: Sequence[float]) -> float:
    """1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for one that says the same everywhere."""
    return 1 - _variance([r - v for v, r in zip(values, returns, strict=True)]) / _variance(returns)


def _variance(values: Sequence[float]) -> float:
    return mean([(v - mean(values)) ** 2 for v in values])
