"""The policy-gradient loss of any row of the table, and the critic's loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sluice.algorithms.aggregation import token_coefficients
from sluice.algorithms.diagnostics import ratio_metrics
from sluice.algorithms.kl import kl_estimates
from sluice.algorithms.ratios import correction_weights, log_ratios
from sluice.algorithms.spec import Algorithm
from sluice.tracking.metrics import Max, Mean, Metrics, Sum


@dataclass
class LossOutput:
    loss: Tensor  # scalar
    per_token: Tensor  # [T] the policy-gradient part before aggregation; 0 where the loss weight is 0
    ratios: Tensor  # [T] 1 where the loss weight is 0
    clipped: Tensor  # [T] bool: a bound or the mask changed this token's gradient
    metrics: Metrics
    """Sums are over the micro-batch, and add up to the update's."""

    def __add__(self, other: LossOutput) -> LossOutput:
        """Of the tokens of both, one after the other."""
        return LossOutput(
            self.loss + other.loss,
            torch.cat([self.per_token, other.per_token]),
            torch.cat([self.ratios, other.ratios]),
            torch.cat([self.clipped, other.clipped]),
            self.metrics + other.metrics,
        )


def policy_loss(
    spec: Algorithm,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_weights: Tensor,
    sequence_ids: Tensor,
    *,
    group_ids: Tensor | None = None,
    coefficients: Tensor | None = None,
    engine_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropies: Tensor | None = None,
) -> LossOutput:
    """The loss of one micro-batch of packed tokens; all inputs are [T], and only `logprobs` and `entropies` carry a gradient.

    `sequence_ids` number the sequences from 0; a sequence lies whole in one micro-batch. `coefficients` are those of
    `token_coefficients` over the whole update; left out, this call is the whole update. The losses of an update's
    micro-batches add up to the update's loss. `engine_logprobs` are needed by a correction, `ref_logprobs` by a KL term,
    `entropies` by an entropy bonus, `group_ids` by prompt_mean. Raises ValueError when one of them is missing.

    Formulas, with r the ratio, A the advantage and sg the stop-gradient; the loss is their negative:
      surrogate  min(r·A, clip(r, 1 - clip_low, 1 + clip_high)·A)   PPO, arXiv 1707.06347, eq. 7
                 where A < 0: max(that, dual_clip·A)                arXiv 1912.09729, eq. 5
      weight     sg(clip(r, ratio_min, ratio_max))·A·log π          CISPO, arXiv 2506.13585, eq. 4-5
      soft_gate  4/τ·σ(τ·(r - 1))·A                                 SAPO, arXiv 2511.20347
      none       sg(r)·A·log π                                      off-policy REINFORCE, arXiv 2506.13585, eq. 3
    times the mask: trust_region, M of arXiv 2506.13585, eq. 7, is 0 where the surrogate's gradient would be 0, else 1; tv is 0
    where the token's probability has left the old one by more than tv_high upwards (A > 0) or tv_low downwards (A < 0)
    (DPPO, arXiv 2602.04879, Binary-TV). Times the correction (see `correction_weights`).
    """
    if coefficients is None:
        coefficients = token_coefficients(spec, loss_weights, sequence_ids, group_ids)
    own = loss_weights != 0
    logprobs = torch.where(own, logprobs, 0.0)
    old_logprobs = torch.where(own, old_logprobs, 0.0)
    advantages = torch.where(own, advantages, 0.0)
    log_ratio = log_ratios(
        "token" if spec.ratio == "none" else spec.ratio, logprobs, old_logprobs, loss_weights, sequence_ids
    )
    ratio = torch.exp(log_ratio.detach())

    metrics, weights = Metrics(), torch.ones_like(ratio)
    if engine_logprobs is not None:
        metrics += _mismatch(old_logprobs, engine_logprobs, own)
    if spec.corrects:
        if engine_logprobs is None:
            raise ValueError("a correction needs engine_logprobs")
        weights = correction_weights(spec, old_logprobs, engine_logprobs, loss_weights, sequence_ids)
        metrics["train/correction/dropped"] = Mean(((weights == 0) & own).sum(), own.sum())
    masked = _masked(spec, logprobs, old_logprobs, ratio, advantages)
    # a token that is out has no advantage; were its loss multiplied by 0, an infinite ratio would leave nan in the gradient
    advantages = torch.where(masked | (weights == 0), 0.0, advantages)
    per_token, clipped = _clipped(spec, logprobs, log_ratio, ratio, advantages)
    per_token = weights * per_token
    clipped = (clipped & (advantages != 0)) | masked  # without an advantage there was no gradient to change
    loss = (coefficients * per_token).sum()
    metrics += _policy_metrics(loss, log_ratio, ratio, clipped, own)
    if spec.kl_in_loss:
        kl_loss = (coefficients * _kl(spec, logprobs, ref_logprobs, own)).sum()
        loss = loss + spec.kl_coef * kl_loss
        metrics["train/kl_loss"] = Sum(kl_loss.detach())
    if spec.entropy_coef:
        if entropies is None:
            raise ValueError("an entropy bonus needs entropies")
        entropy = (coefficients * torch.where(own, entropies, 0.0)).sum()
        loss = loss - spec.entropy_coef * entropy
        metrics["train/entropy_loss"] = Sum(entropy.detach())
    return LossOutput(loss, per_token, ratio, clipped, metrics)


def _kl(spec: Algorithm, logprobs: Tensor, ref_logprobs: Tensor | None, own: Tensor) -> Tensor:
    if ref_logprobs is None:
        raise ValueError("a KL term needs ref_logprobs")
    return kl_estimates(str(spec.kl_estimator), logprobs, torch.where(own, ref_logprobs, 0.0))


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, coefficients: Tensor, clip: float | None
) -> LossOutput:
    """½·max((V - G)², (clip(V, V_old - clip, V_old + clip) - G)²) per token, all [T]; without `clip` ½·(V - G)².

    As in OpenAI's PPO2; PPO itself (arXiv 1707.06347, eq. 9) leaves the value loss unclipped.
    """
    own = coefficients != 0
    values, old_values, returns = (torch.where(own, x, 0.0) for x in (values, old_values, returns))
    error = (values - returns).square()
    clipped = torch.zeros_like(own)
    if clip is not None:
        bounded = (values.clamp(old_values - clip, old_values + clip) - returns).square()
        clipped = bounded > error
        error = torch.maximum(error, bounded)
    per_token = error / 2
    loss = (coefficients * per_token).sum()
    metrics = Metrics(
        {"train/value_loss": Sum(loss.detach()), "train/value_clipfrac": Mean((clipped & own).sum(), own.sum())}
    )
    return LossOutput(loss, per_token, torch.ones_like(values), clipped & own, metrics)


def _clipped(
    spec: Algorithm, logprobs: Tensor, log_ratio: Tensor, ratio: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of each token under the clip rule, and where a bound changed it."""
    if spec.clip == "surrogate":
        return _surrogate(spec, log_ratio, ratio, advantages)
    if spec.clip == "soft_gate":
        return _soft_gate(spec, log_ratio, ratio, advantages), torch.zeros_like(ratio, dtype=torch.bool)
    weight, clipped = _weight(spec, ratio)
    # without a bound the weight may be inf, and inf · 0 is nan
    return -torch.where(advantages == 0, 0.0, weight * advantages) * logprobs, clipped


def _surrogate(spec: Algorithm, log_ratio: Tensor, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """-min(r·A, clip(r)·A), and where the bound is the smaller one and stops the gradient."""
    assert spec.clip_low is not None
    assert spec.clip_high is not None
    clipped = _outside(spec, ratio, advantages)
    bounded = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    if spec.dual_clip is not None:
        beyond = (advantages < 0) & (ratio > spec.dual_clip)
        clipped, bounded = clipped | beyond, torch.where(beyond, spec.dual_clip, bounded)
    constant = clipped | (advantages == 0)
    # a constant token never sees exp of its own log-ratio: it may be inf, and 0 · inf is nan in the gradient
    free = torch.exp(torch.where(constant, 0.0, log_ratio)) * advantages
    return -torch.where(constant, bounded * advantages, free), clipped


def _soft_gate(spec: Algorithm, log_ratio: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor:
    """-4/τ·σ(τ·(r - 1))·A; its gradient, 4·σ·(1 - σ)·r·A, is A at r = 1 and fades on both sides."""
    assert spec.gate_positive is not None
    assert spec.gate_negative is not None
    tau = torch.full_like(ratio, spec.gate_negative).masked_fill(advantages > 0, spec.gate_positive)
    # beyond any float's resolution of σ: held constant, since an infinite ratio times a gradient of 0 is nan
    saturated = ratio > 1 + 800 / tau
    current = torch.exp(torch.where(saturated, 0.0, log_ratio))
    # by its logarithm, whose gradient keeps its digits where σ is nearly 1
    gate = torch.where(saturated, 1.0, logsigmoid(tau * (current - 1)).exp())
    return -4 / tau * gate * advantages


def _weight(spec: Algorithm, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Stop-gradient factor of A·log π, and where a bound changed it."""
    weight = torch.ones_like(ratio) if spec.ratio == "none" else ratio
    if spec.clip == "none":
        return weight, torch.zeros_like(ratio, dtype=torch.bool)
    bounded = weight.clamp(spec.ratio_min or 0.0, spec.ratio_max)
    return bounded, bounded != weight


@torch.no_grad()
def _masked(spec: Algorithm, logprobs: Tensor, old_logprobs: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor:
    """Where the mask is 0."""
    if spec.mask == "none":
        return torch.zeros_like(ratio, dtype=torch.bool)
    if spec.mask == "trust_region":
        return _outside(spec, ratio, advantages)
    assert spec.tv_low is not None
    assert spec.tv_high is not None
    moved = logprobs.exp() - old_logprobs.exp()
    return ((advantages > 0) & (moved > spec.tv_high)) | ((advantages < 0) & (-moved > spec.tv_low))


def _outside(spec: Algorithm, ratio: Tensor, advantages: Tensor) -> Tensor:
    """Where PPO's surrogate has no gradient: the ratio has left the trust region on the side that A pushes to."""
    assert spec.clip_low is not None
    assert spec.clip_high is not None
    return ((advantages > 0) & (ratio > 1 + spec.clip_high)) | ((advantages < 0) & (ratio < 1 - spec.clip_low))


@torch.no_grad()
def _policy_metrics(loss: Tensor, log_ratio: Tensor, ratio: Tensor, clipped: Tensor, own: Tensor) -> Metrics:
    """Names of the field: ppo_kl is the mean of log π_old - log π (k1) and pg_clipfrac the clipped share of loss tokens."""
    count = own.sum()
    return Metrics(
        {
            "train/pg_loss": Sum(loss.detach()),
            "train/ppo_kl": Mean(-log_ratio.sum(), count),
            "train/pg_clipfrac": Mean(clipped.sum(), count),
            "train/ratio/max": Max(torch.where(own, ratio, 0.0).max() if len(own) else 0.0),
        }
    ) + ratio_metrics("train/ratio", ratio, own)


@torch.no_grad()
def _mismatch(old_logprobs: Tensor, engine_logprobs: Tensor, own: Tensor) -> Metrics:
    """How far the trainer's policy before the step is from the engine's: KL(engine || trainer) by k1 and k3, and their ratio."""
    old_logprobs, engine_logprobs = (torch.where(own, x, 0.0) for x in (old_logprobs, engine_logprobs))
    k1, k3 = (kl_estimates(estimator, engine_logprobs, old_logprobs).sum() for estimator in ("k1", "k3"))
    return Metrics(
        {"train/mismatch/kl": Mean(k1, own.sum()), "train/mismatch/k3": Mean(k3, own.sum())}
    ) + ratio_metrics("train/mismatch", torch.exp(old_logprobs - engine_logprobs), own)
