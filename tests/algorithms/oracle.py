"""The objectives as their papers write them: one response after the other, one token after the other, in float64.

Written from the papers, never from sluice's code. `min` and `max` are Python's, so that autograd follows only the branch that
was taken; a number whose gradient the paper stops is a plain float. Every J is to be maximised: the loss is -J.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor


@dataclass
class Response:
    """One o_i: the tokens that the policy wrote itself, and nothing of what it was told."""

    logprobs: list[Tensor]  # log π_θ(o_it | q, o_i<t), float64 leaves
    old_logprobs: list[float]  # log π_θold(o_it | q, o_i<t)
    advantages: list[float]  # Â_it; most papers give all tokens of a response the same
    weights: list[float]  # how much a token counts in the mean; 1 in every paper
    group: int = 0  # which prompt it answers
    engine_logprobs: list[float] = field(default_factory=list[float])  # log π_sampler
    ref_logprobs: list[float] = field(default_factory=list[float])  # log π_ref
    entropies: list[Tensor] = field(default_factory=list[Tensor])  # of the distribution that o_it was drawn from


Term = Callable[[Response, int], Any]
"""A token's part of J, before anything is averaged."""
Aggregate = Callable[[Sequence[Response], Term], Any]


def sg(x: Tensor) -> float:
    """The stop-gradient: a plain number."""
    return float(x.detach())


def mean(values: Sequence[Any]) -> Any:
    return sum(values) / len(values)


def clip(x: Any, low: float, high: float) -> Any:
    return min(max(x, low), high)


# ratios


def token_ratio(o: Response, t: int) -> Tensor:
    return torch.exp(o.logprobs[t] - o.old_logprobs[t])


def sequence_ratio(o: Response, t: int = 0) -> Tensor:
    """s_i of GSPO, arXiv 2507.18071, eq. 7: (π_θ(o_i) / π_θold(o_i)) to the power 1 / |o_i|, for each token the same."""
    return torch.exp(mean([new - old for new, old in zip(o.logprobs, o.old_logprobs, strict=True)]))


# means


def token_mean(responses: Sequence[Response], term: Term) -> Any:
    """DAPO, arXiv 2503.14476, eq. 8: 1 / Σ|o_i| · Σ_i Σ_t; with weights, Σ w·L / Σ w."""
    return sum(_sum(o, term) for o in responses) / sum(sum(o.weights) for o in responses)


def sequence_mean(responses: Sequence[Response], term: Term) -> Any:
    """GRPO, arXiv 2402.03300, eq. 3: 1/G Σ_i 1/|o_i| Σ_t."""
    return mean([token_mean([o], term) for o in responses])


def prompt_mean(responses: Sequence[Response], term: Term) -> Any:
    """DAPO, arXiv 2503.14476, eq. 8, whose expectation is over prompts: each group's own token mean, and the mean of those.

    ScaleRL, arXiv 2510.13786, section 3.2, calls it prompt average.
    """
    groups = {o.group: [other for other in responses if other.group == o.group] for o in responses}
    return mean([token_mean(group, term) for group in groups.values()])


def constant(responses: Sequence[Response], term: Term, size: float) -> Any:
    """Dr. GRPO, arXiv 2503.20783, section 3.2: 1/G Σ_i Σ_t, over the constant of its listing 1."""
    return mean([_sum(o, term) / size for o in responses])


def blend(responses: Sequence[Response], term: Term, share: float) -> Any:
    """Between the first two: every token counts the same at share 1, every response at share 0."""
    return share * token_mean(responses, term) + (1 - share) * sequence_mean(responses, term)


def _sum(o: Response, term: Term) -> Any:
    return sum(o.weights[t] * term(o, t) for t in range(len(o.logprobs)))


# terms


def reinforce(o: Response, t: int) -> Any:
    """Williams 1992: R·log π."""
    return o.advantages[t] * o.logprobs[t]


def off_policy_reinforce(o: Response, t: int) -> Any:
    """MiniMax-M1, arXiv 2506.13585, eq. 3: sg(r_it)·Â·log π."""
    return sg(token_ratio(o, t)) * o.advantages[t] * o.logprobs[t]


def clipped_weight(o: Response, t: int, low: float, high: float, ratio: Callable[..., Tensor] = token_ratio) -> Any:
    """CISPO, MiniMax-M1, arXiv 2506.13585, eq. 4-5: sg(clip(r_it))·Â·log π."""
    return clip(sg(ratio(o, t)), low, high) * o.advantages[t] * o.logprobs[t]


def surrogate(o: Response, t: int, low: float, high: float, ratio: Callable[..., Tensor] = token_ratio) -> Any:
    """PPO, arXiv 1707.06347, eq. 7."""
    r, advantage = ratio(o, t), o.advantages[t]
    return min(r * advantage, clip(r, 1 - low, 1 + high) * advantage)


def dual_clipped(o: Response, t: int, low: float, high: float, c: float) -> Any:
    """Mastering Complex Control in MOBA Games, arXiv 1912.09729, eq. 5: where Â < 0, not below c·Â."""
    value = surrogate(o, t, low, high)
    return max(value, c * o.advantages[t]) if o.advantages[t] < 0 else value


def unified(o: Response, t: int) -> Any:
    """MiniMax-M1, arXiv 2506.13585, eq. 6-7: CISPO's term times M_it, with ε = 0.2 in M."""
    r, advantage = sg(token_ratio(o, t)), o.advantages[t]
    outside = (advantage > 0 and r > 1 + 0.2) or (advantage < 0 and r < 1 - 0.2)
    return (0 if outside else 1) * clipped_weight(o, t, 0, 5)


def soft_gated(o: Response, t: int, positive: float, negative: float) -> Any:
    """SAPO, arXiv 2511.20347: f(r) = σ(τ·(r - 1))·4/τ, with a τ of its own for Â > 0.

    At r = ∞ the gate is open and flat: σ = 1, and its slope falls faster than r rises.
    """
    r, advantage = token_ratio(o, t), o.advantages[t]
    tau = positive if advantage > 0 else negative
    gate = 1.0 if math.isinf(sg(r)) else 1 / (1 + torch.exp(-tau * (r - 1)))
    return gate * 4 / tau * advantage


def binary_tv(o: Response, t: int, low: float, high: float, cap: float) -> Any:
    """DPPO, arXiv 2602.04879: the mask of its binary total variation |π_θ(o_it) - π_θold(o_it)|, on the side that Â pushes to.

    Its ratio is cut at `cap`, and has no gradient of its own.
    """
    advantage = o.advantages[t]
    moved = math.exp(sg(o.logprobs[t])) - math.exp(o.old_logprobs[t])
    outside = (advantage > 0 and moved > high) or (advantage < 0 and moved < -low)
    return (0 if outside else 1) * clipped_weight(o, t, 0, cap)


# rows

PPO = partial(surrogate, low=0.2, high=0.2)

ROWS: dict[str, tuple[Term, Aggregate]] = {
    # MiniMax-M1, arXiv 2506.13585, eq. 4, with no lower bound and 1 + ε_high = 5
    "cispo": (partial(clipped_weight, low=0, high=5), token_mean),
    # DeepSeekMath, arXiv 2402.03300, eq. 3, with ε = 0.2 and β = 0
    "grpo": (PPO, sequence_mean),
    # Understanding R1-Zero-Like Training, arXiv 2503.20783, section 3.2
    "dr_grpo": (PPO, partial(constant, size=48.0)),
    # GLM-4.5, arXiv 2508.06471, section 3: centred advantages and no KL term, each token counting the same
    "glm": (PPO, token_mean),
    # DAPO, arXiv 2503.14476, eq. 8-10, with ε_low = 0.2 and ε_high = 0.28
    "dapo": (partial(surrogate, low=0.2, high=0.28), token_mean),
    # GSPO, arXiv 2507.18071, eq. 5, with the bounds of its section 5.1
    "gspo": (partial(surrogate, low=3e-4, high=4e-4, ratio=sequence_ratio), sequence_mean),
    "reinforce": (reinforce, token_mean),
    # Back to Basics, arXiv 2402.14740, eq. 7: 1/k Σ_i A_i·∇log π(o_i), log π(o_i) being the sum over its tokens
    "rloo": (reinforce, partial(constant, size=1.0)),
    # REINFORCE++, arXiv 2501.03262: PPO's surrogate on advantages whitened over the batch
    "reinforce_pp": (PPO, token_mean),
    "reinforce_pp_baseline": (PPO, token_mean),
    "ppo": (partial(dual_clipped, low=0.2, high=0.2, c=3.0), token_mean),
    "unified": (unified, token_mean),
    # SAPO, arXiv 2511.20347, with the temperatures of its experiments
    "sapo": (partial(soft_gated, positive=1.0, negative=1.05), sequence_mean),
    "dppo": (partial(binary_tv, low=0.15, high=0.15, cap=math.inf), partial(constant, size=48.0)),
}
