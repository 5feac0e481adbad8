"""The objectives as their papers write them: one response after the other, one token after the other, in float64.

Written from the papers, never from sluice's code. `min` and `max` are Python's, so that autograd follows only the branch that
was taken; a number whose gradient the paper stops is a plain float. Every J is to be maximised: the loss is -J.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Response:
    """One o_i: the tokens that the policy wrote itself, and nothing of what it was told."""

    logprobs: list[Tensor]  # log π_θ(o_it | q, o_i<t), float64 leaves
    old_logprobs: list[float]  # log π_θold(o_it | q, o_i<t)
    advantage: float  # Â_i, of all of its tokens


def sg(x: Tensor) -> float:
    """The stop-gradient: a plain number."""
    return float(x.detach())


def mean(values: Sequence[Any]) -> Any:
    return sum(values) / len(values)


def clip(x: Any, low: float, high: float) -> Any:
    return min(max(x, low), high)


def token_ratio(o: Response, t: int) -> Tensor:
    return torch.exp(o.logprobs[t] - o.old_logprobs[t])


def sequence_ratio(o: Response) -> Tensor:
    """s_i of GSPO, arXiv 2507.18071, eq. 7: (π_θ(o_i) / π_θold(o_i)) to the power 1 / |o_i|."""
    return torch.exp(mean([new - old for new, old in zip(o.logprobs, o.old_logprobs, strict=True)]))


def surrogate(ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
    """PPO, arXiv 1707.06347, eq. 7."""
    return min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)


def per_token(responses: Sequence[Response], term: Callable[[Response, int], Any]) -> list[list[Any]]:
    return [[term(o, t) for t in range(len(o.logprobs))] for o in responses]


def token_mean(terms: list[list[Any]]) -> Any:
    """1 / Σ|o_i| · Σ_i Σ_t"""
    return sum(sum(row) for row in terms) / sum(len(row) for row in terms)


def grpo(responses: Sequence[Response]) -> Any:
    """DeepSeekMath, arXiv 2402.03300, eq. 3, with ε = 0.2 and β = 0: 1/G Σ_i 1/|o_i| Σ_t."""
    return mean([mean(row) for row in per_token(responses, _ppo(0.2, 0.2))])


def dr_grpo(responses: Sequence[Response], max_tokens: float) -> Any:
    """Understanding R1-Zero-Like Training, arXiv 2503.20783, section 3.2: 1/G Σ_i Σ_t, over the constant of its listing 1."""
    return mean([sum(row) / max_tokens for row in per_token(responses, _ppo(0.2, 0.2))])


def glm(responses: Sequence[Response]) -> Any:
    """GLM-4.5, arXiv 2508.06471, section 3: centred advantages and no KL term, each token counting the same."""
    return token_mean(per_token(responses, _ppo(0.2, 0.2)))


def dapo(responses: Sequence[Response]) -> Any:
    """DAPO, arXiv 2503.14476, eq. 8-10, with ε_low = 0.2 and ε_high = 0.28: 1 / Σ|o_i| · Σ_i Σ_t."""
    return token_mean(per_token(responses, _ppo(0.2, 0.28)))


def gspo(responses: Sequence[Response]) -> Any:
    """GSPO, arXiv 2507.18071, eq. 5, with the bounds of its section 5.1: 1/G Σ_i min(s_i·Â_i, clip(s_i)·Â_i)."""
    return mean([surrogate(sequence_ratio(o), o.advantage, 3e-4, 4e-4) for o in responses])


def reinforce(responses: Sequence[Response]) -> Any:
    """Williams 1992, R·log π; 1 / Σ|o_i| outside."""
    return token_mean(per_token(responses, lambda o, t: o.advantage * o.logprobs[t]))


def off_policy_reinforce(responses: Sequence[Response]) -> Any:
    """MiniMax-M1, arXiv 2506.13585, eq. 3: sg(r_it)·Â·log π."""
    return token_mean(per_token(responses, lambda o, t: sg(token_ratio(o, t)) * o.advantage * o.logprobs[t]))


def cispo(responses: Sequence[Response]) -> Any:
    """MiniMax-M1, arXiv 2506.13585, eq. 4-5, with no lower bound and 1 + ε_high = 5: sg(clip(r_it))·Â·log π."""
    return token_mean(
        per_token(responses, lambda o, t: clip(sg(token_ratio(o, t)), 0, 5) * o.advantage * o.logprobs[t])
    )


def unified(responses: Sequence[Response]) -> Any:
    """MiniMax-M1, arXiv 2506.13585, eq. 6-7: CISPO's term times M_it, with ε = 0.2 in M."""

    def term(o: Response, t: int) -> Any:
        ratio = sg(token_ratio(o, t))
        outside = (o.advantage > 0 and ratio > 1 + 0.2) or (o.advantage < 0 and ratio < 1 - 0.2)
        m = 0 if outside else 1
        return clip(ratio, 0, 5) * o.advantage * o.logprobs[t] * m

    return token_mean(per_token(responses, term))


def sequence_cispo(responses: Sequence[Response]) -> Any:
    """CISPO with GSPO's ratio, and a floor of 0.5 under its weight."""
    return token_mean(
        per_token(responses, lambda o, t: clip(sg(sequence_ratio(o)), 0.5, 5) * o.advantage * o.logprobs[t])
    )


def _ppo(low: float, high: float) -> Callable[[Response, int], Tensor]:
    return lambda o, t: surrogate(token_ratio(o, t), o.advantage, low, high)


def z_scores(rewards: Sequence[float], eps: float) -> list[float]:
    """GRPO, arXiv 2402.03300, section 4.1.2: (r_i - mean) / std, of a sample: over n - 1. No spread, no advantage."""
    centred = centre(rewards)
    if not any(centred):
        return centred
    std = math.sqrt(math.fsum(c * c for c in centred) / (len(rewards) - 1))
    return [c / (std + eps) for c in centred]


def centre(rewards: Sequence[float]) -> list[float]:
    """Dr. GRPO, arXiv 2503.20783, section 3.2: r_i - mean."""
    if all(r == rewards[0] for r in rewards):
        return [0.0] * len(rewards)
    average = math.fsum(rewards) / len(rewards)
    return [r - average for r in rewards]
