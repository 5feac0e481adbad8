"""The policy-gradient loss of any row of the table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sluice.algorithms.aggregation import Totals, token_coefficients
from sluice.algorithms.ratios import log_ratios
from sluice.algorithms.spec import Algorithm
from sluice.tracking.metrics import Max, Mean, Metrics


@dataclass
class LossOutput:
    loss: Tensor  # scalar
    per_token: Tensor  # [T] before aggregation; 0 where the loss weight is 0
    ratios: Tensor  # [T] 1 where the loss weight is 0
    clipped: Tensor  # [T] bool: the bound changed this token's gradient
    metrics: Metrics


def policy_loss(
    spec: Algorithm,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_weights: Tensor,
    sequence_ids: Tensor,
    totals: Totals | None = None,
) -> LossOutput:
    """The loss of one micro-batch of packed tokens; all inputs are [T], and only `logprobs` carries a gradient.

    `sequence_ids` number the sequences from 0. `totals` are the counts of the whole update; left out, this call is
    the whole update. The losses of an update's micro-batches add up to the update's loss.

    Formulas, with r the ratio, A the advantage and sg the stop-gradient; the loss is their negative:
      surrogate  min(r·A, clip(r, 1 - clip_low, 1 + clip_high)·A)   PPO, arXiv 1707.06347, eq. 7
      weight     sg(clip(r, ratio_min, ratio_max))·A·log π          CISPO, arXiv 2506.13585, eq. 4-5
      none       sg(r)·A·log π                                      off-policy REINFORCE, ibid. eq. 3; r = 1 without ratio
    times, with mask trust_region, M of ibid. eq. 7: 0 where the surrogate's gradient would be 0, else 1.
    """
    totals = totals or Totals.of(loss_weights, sequence_ids)
    own = loss_weights != 0
    logprobs = torch.where(own, logprobs, 0.0)
    advantages = torch.where(own, advantages, 0.0)
    log_ratio = log_ratios(
        "token" if spec.ratio == "none" else spec.ratio, logprobs, old_logprobs, loss_weights, sequence_ids
    )
    ratio = torch.exp(log_ratio.detach())

    if spec.clip == "surrogate":
        per_token, clipped = _surrogate(spec, log_ratio, ratio, advantages)
    else:
        weight, clipped = _weight(spec, ratio, advantages)
        # without a bound the weight may be inf, and inf · 0 is nan
        per_token = -torch.where(advantages == 0, 0.0, weight * advantages) * logprobs
    per_token = torch.where(own, per_token, 0.0)
    clipped = clipped & own

    coefficients = token_coefficients(spec.aggregation, loss_weights, sequence_ids, totals, spec.loss_constant)
    loss = (coefficients * per_token).sum()
    return LossOutput(
        loss, per_token, ratio.detach(), clipped, _metrics(loss, log_ratio, ratio, clipped, loss_weights, totals)
    )


def _surrogate(spec: Algorithm, log_ratio: Tensor, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """-min(r·A, clip(r)·A), and where the bound is the smaller one and stops the gradient."""
    assert spec.clip_low is not None
    assert spec.clip_high is not None
    clipped = _outside(spec, ratio, advantages)
    constant = clipped | (advantages == 0)
    # a constant token never sees exp of its own log-ratio: it may be inf, and 0 · inf is nan in the gradient
    free = torch.exp(torch.where(constant, 0.0, log_ratio)) * advantages
    return -torch.where(constant, ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high) * advantages, free), clipped


def _weight(spec: Algorithm, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Stop-gradient factor of A·log π, and where a bound or the mask changed it."""
    weight = torch.ones_like(ratio) if spec.ratio == "none" else ratio
    clipped = torch.zeros_like(ratio, dtype=torch.bool)
    if spec.clip == "weight":
        weight = ratio.clamp(spec.ratio_min or 0.0, spec.ratio_max)
        clipped = weight != ratio
    if spec.mask == "trust_region":
        outside = _outside(spec, ratio, advantages)
        weight = torch.where(outside, 0.0, weight)
        clipped = clipped | outside
    return weight, clipped


def _outside(spec: Algorithm, ratio: Tensor, advantages: Tensor) -> Tensor:
    """Where PPO's surrogate has no gradient: the ratio has left the trust region on the side that A pushes to."""
    assert spec.clip_low is not None
    assert spec.clip_high is not None
    return ((advantages > 0) & (ratio > 1 + spec.clip_high)) | ((advantages < 0) & (ratio < 1 - spec.clip_low))


@torch.no_grad()
def _metrics(
    loss: Tensor, log_ratio: Tensor, ratio: Tensor, clipped: Tensor, loss_weights: Tensor, totals: Totals
) -> Metrics:
    """Names of the field: ppo_kl is the mean of log π_old - log π (k1) and pg_clipfrac the clipped share of loss tokens."""
    own = loss_weights != 0
    count = own.sum()
    share = loss_weights.sum() / max(totals.loss_weight, 1e-30)  # adds up to 1 over an update: a mean over updates
    return Metrics(
        {
            "train/pg_loss": Mean(loss.detach(), share),
            "train/ppo_kl": Mean(-log_ratio.sum(), count),
            "train/pg_clipfrac": Mean(clipped.sum(), count),
            "train/ratio/max": Max(torch.where(own, ratio, 0.0).max() if len(own) else 0.0),
        }
    )
