"""Importance ratios: of the current policy against the old one, and of the trainer against the engine that sampled."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sluice.algorithms.aggregation import sums_by
from sluice.algorithms.spec import Algorithm


def log_ratios(
    level: Literal["token", "sequence"],
    logprobs: Tensor,
    old_logprobs: Tensor,
    loss_weights: Tensor,
    sequence_ids: Tensor,
) -> Tensor:
    """log r for each token, [T] → [T]; 0 where the loss weight is 0, whatever the log-probs there.

    token: log π(t) - log π_old(t). sequence: its mean over the sequence's own loss tokens, the same for all of
    them (GSPO, arXiv 2507.18071, eq. 7; in its gradient every token's log-prob carries 1/|o|).
    """
    own = loss_weights != 0
    # where, not a product: a masked token may have log-prob -inf, and 0 · inf is nan in the value and in the gradient
    difference = torch.where(own, logprobs, 0.0) - torch.where(own, old_logprobs, 0.0)
    if level == "token":
        return difference
    return _over_sequence(difference, own, sequence_ids, mean=True)


def correction_weights(
    spec: Algorithm, old_logprobs: Tensor, engine_logprobs: Tensor, loss_weights: Tensor, sequence_ids: Tensor
) -> Tensor:
    """[T] → the factor of each token's policy loss that corrects for π_engine having sampled instead of π_old.

    ρ = π_old / π_engine of the token; `sequence`: its product over the response; `geometric`: its geometric mean.
    tis: min(ρ, correction_max) (truncated importance sampling, Yao et al. 2025, "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training"). mis: ρ, or 0 above correction_max and below correction_min, where that is given
    (masked importance sampling, Liu et al. 2025, "When Speed Kills Stability"). icepop: ρ, or 0 outside of both bounds
    (Ring-1T, arXiv 2510.18855). Rejection: 0 for a whole response whose product or geometric mean of ρ lies outside
    of its bounds. The factor stands inside the expectation, so what it drops still counts in the aggregation's divisor.
    """
    own = loss_weights != 0
    log_rho = log_ratios("token", old_logprobs, engine_logprobs, loss_weights, sequence_ids)
    levels = {"token": log_rho}
    for level in {spec.correction_level, spec.rejection} & {"sequence", "geometric"}:
        levels[str(level)] = _over_sequence(log_rho, own, sequence_ids, mean=level == "geometric")
    weights = torch.ones_like(log_rho)
    if spec.correction != "none":
        assert spec.correction_max is not None
        weights = torch.exp(levels[str(spec.correction_level)])
        if spec.correction == "tis":
            weights = weights.clamp(max=spec.correction_max)
        else:
            weights = torch.where(_between(weights, spec.correction_min, spec.correction_max), weights, 0.0)
    if spec.rejection != "none":
        kept = _between(torch.exp(levels[spec.rejection]), spec.rejection_min, spec.rejection_max)
        weights = torch.where(kept, weights, 0.0)
    return torch.where(own, weights, 1.0)


def _between(values: Tensor, low: float | None, high: float | None) -> Tensor:
    return (values >= (low or 0.0)) & (values <= (torch.inf if high is None else high))


def _over_sequence(difference: Tensor, own: Tensor, sequence_ids: Tensor, mean: bool) -> Tensor:
    """Each own token gets the sum, or the mean, over its sequence's own tokens; the others 0."""
    totals = sums_by(sequence_ids, difference)
    if mean:
        totals = totals / sums_by(sequence_ids, own.to(difference.dtype)).clamp(min=1)
    return torch.where(own, totals[sequence_ids], 0.0)
