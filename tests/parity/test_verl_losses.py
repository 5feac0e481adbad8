"""Every loss of verl's that a row of the table has: loss, each token's share of it, and gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from verl.trainer.ppo import core_algos

from parity.compare import assert_equal, assert_same_loss
from parity.peers_verl import means_of, verl_loss
from parity.ragged import MAX_TOKENS, SEEDS, Measured, ragged, row, sluice_loss
from sluice.algorithms import value_loss
from sluice.algorithms.aggregation import token_coefficients
from sluice.algorithms.kl import kl_estimates

both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
NEVER = 1e30
"""verl cannot leave the dual clip out, but its bound may be so high that no ratio gets there."""

DAPO: dict[str, Any] = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
GSPO: dict[str, Any] = {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}
CISPO: dict[str, Any] = {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}  # distances from 1: ratios from 0 to 5
DPPO: dict[str, Any] = {"clip_ratio_low": 0.15, "clip_ratio_high": 0.15, "clip_ratio_c": 20.0}
PER_SEQUENCE = "seq-mean-token-mean"

LOSSES = {
    "grpo": (row("grpo"), "vanilla", PER_SEQUENCE, {"clip_ratio_c": NEVER}),
    "grpo, dual clip": (row("grpo", dual_clip=3.0), "vanilla", PER_SEQUENCE, {}),
    "dr_grpo": (
        row("dr_grpo"),
        "vanilla",
        "seq-mean-token-sum-norm",
        {"loss_scale_factor": MAX_TOKENS, "clip_ratio_c": NEVER},
    ),
    "glm": (row("glm"), "vanilla", "token-mean", {"clip_ratio_c": NEVER}),
    "dapo": (row("dapo"), "vanilla", "token-mean", DAPO | {"clip_ratio_c": NEVER}),
    "dapo, dual clip": (row("dapo", dual_clip=3.0), "vanilla", "token-mean", DAPO),
    "ppo": (row("ppo"), "vanilla", "token-mean", {}),
    "gspo": (row("gspo"), "gspo", PER_SEQUENCE, GSPO),
    "gspo, token mean": (row("gspo", aggregation="token_mean"), "gspo", "token-mean", GSPO),
    "cispo": (row("cispo"), "cispo", "token-mean", CISPO),
    "cispo, lower bound": (row("cispo", ratio_min=0.8, ratio_max=1.2), "cispo", "token-mean", {}),
    "sapo": (row("sapo"), "sapo", PER_SEQUENCE, {}),
    "dppo": (
        row("dppo"),
        "dppo_tv",
        "seq-mean-token-sum-norm",
        DPPO | {"clip_ratio_c": NEVER, "loss_scale_factor": MAX_TOKENS},
    ),
    "dppo, bounded": (
        row("dppo", clip="weight", ratio_max=20.0, aggregation="token_mean"),
        "dppo_tv",
        "token-mean",
        DPPO,
    ),
    "rloo": (row("rloo"), "reinforce", "seq-mean-token-sum", {}),
    "reinforce": (row("reinforce"), "gpg", "token-mean", {}),
}


@both_dtypes
@pytest.mark.parametrize("name", LOSSES)
def test_the_policy_loss_is_verls(name: str, dtype: torch.dtype):
    spec, function, aggregation, settings = LOSSES[name]
    for seed in SEEDS:
        batch = ragged(seed, dtype, shared=spec.ratio == "sequence")
        scale = means_of(batch) if aggregation == PER_SEQUENCE else None
        assert_same_loss(
            f"verl {function}: {name}",
            sluice_loss(spec, batch, scale),
            verl_loss(function, batch, aggregation, **settings),
        )


@pytest.mark.parametrize("name", LOSSES)
def test_the_batches_reach_every_bound(name: str):
    """A comparison in which a bound is never hit says nothing of it."""
    spec = LOSSES[name][0]
    for without in ({"clip": "none"}, {"mask": "none"}, {"dual_clip": None}, {"ratio_min": None}):
        (word, value), *_ = without.items()
        if getattr(spec, word) != value:
            freed = replace(spec, **without)
            assert any(
                not torch.equal(sluice_loss(spec, batch).gradient, sluice_loss(freed, batch).gradient)
                for batch in map(ragged, SEEDS)
            ), word


def test_beyond_a_log_ratio_of_20_verl_holds_the_ratio():
    """verl's ratio is exp(clamp(d, -20, 20)), without gradient outside; sluice's is exp(d)."""
    d = torch.tensor([-25.0, -21.0, -19.0, 19.0, 21.0, 25.0], dtype=torch.float64)
    base = ragged(0, sizes=(6,))
    moved = d[:, None].expand_as(base.mask).contiguous()
    inside = (d.abs() < 20)[:, None] & base.own
    for advantage in (1.0, -1.0):
        advantages = torch.full_like(base.mask, advantage)
        batch = replace(base, logprobs=moved, old_logprobs=torch.zeros_like(moved), advantages=advantages)
        held = replace(batch, logprobs=moved.clamp(-20, 20))
        for name in ("glm", "sapo"):
            spec, function, aggregation, settings = LOSSES[name]
            theirs = verl_loss(function, batch, aggregation, **settings)
            ours = sluice_loss(spec, held, means_of(batch) if aggregation == PER_SEQUENCE else None)
            assert_equal("verl: ratio held in exp(±20)", ours.loss, theirs.loss)
            assert_equal("verl: ratio held in exp(±20)", ours.gradient[inside], theirs.gradient[inside])
            assert not theirs.gradient[~inside].any()


# the other terms


KL = {"k1": "k1", "k2": "k2", "k3": "low_var_kl", "k1_st": "k1+", "k3_st": "k3+"}


@both_dtypes
@pytest.mark.parametrize("estimator", KL)
def test_kl_estimators_are_verls(estimator: str, dtype: torch.dtype):
    for seed in SEEDS:
        batch = ragged(seed, dtype)
        values, gradients = [], []
        for function, word in ((kl_estimates, estimator), (core_algos.kl_penalty, KL[estimator])):
            logprobs = batch.logprobs.clone().requires_grad_()
            value = (
                function(word, logprobs, batch.ref_logprobs)
                if function is kl_estimates
                else function(logprobs, batch.ref_logprobs, word)
            )
            values.append(value.detach())
            gradients.append(torch.autograd.grad(value.sum(), logprobs)[0])
        assert_equal(f"verl kl_penalty: {estimator}", *values)
        assert_equal(f"verl kl_penalty: {estimator}", *gradients)


def test_verl_clamps_k3():
    """min(exp(-d) - 1 + d, 10) with d held in [-20, 20]: above 10 its k3 has no gradient, and k3_st keeps that of k2."""
    d = torch.tensor([-5.0, -2.0, 0.0, 2.0, 9.0, 15.0], dtype=torch.float64)
    zeros = torch.zeros_like(d)
    assert_equal(
        "verl k3, clamped", kl_estimates("k3", d, zeros).clamp(max=10), core_algos.kl_penalty(d, zeros, "low_var_kl")
    )


@both_dtypes
@pytest.mark.parametrize("aggregation", [("token_mean", "token-mean"), ("sequence_mean", PER_SEQUENCE)], ids=str)
def test_kl_and_entropy_terms_are_aggregated_as_in_verl(aggregation: tuple[str, str], dtype: torch.dtype):
    """verl's `ppo_loss` adds kl_loss_coef · agg(KL) and takes entropy_coeff · agg(H), each by the policy loss's `loss_agg_mode`."""
    word, mode = aggregation
    spec = row("glm", aggregation=word, kl_coef=0.3, entropy_coef=0.2)
    for seed in SEEDS:
        batch = ragged(seed, dtype)
        scale = means_of(batch) if mode == PER_SEQUENCE else None
        theirs = verl_loss("vanilla", batch, mode, clip_ratio_c=NEVER)
        logprobs = batch.logprobs.clone().requires_grad_()
        kl = core_algos.agg_loss(core_algos.kl_penalty(logprobs, batch.ref_logprobs, "k3"), batch.mask, mode)
        (gradient,) = torch.autograd.grad(kl, logprobs)
        entropy = core_algos.agg_loss(batch.entropies, batch.mask, mode)
        whole = Measured(theirs.loss + 0.3 * kl.detach() - 0.2 * entropy, theirs.gradient + 0.3 * gradient)
        assert_same_loss(f"verl kl_loss and entropy: {word}", sluice_loss(spec, batch, scale), whole)


@both_dtypes
@pytest.mark.parametrize("clip", [0.2, None], ids=["clipped", "free"])
def test_the_value_loss_is_verls(clip: float | None, dtype: torch.dtype):
    for seed in SEEDS:
        batch = ragged(seed, dtype)
        coefficients = token_coefficients(row("ppo"), batch.packed(batch.mask), batch.sequence_ids)
        ours, theirs = (batch.values.clone().requires_grad_() for _ in range(2))
        output = value_loss(*(batch.packed(x) for x in (ours, batch.old_values, batch.returns)), coefficients, clip)
        loss, _ = core_algos.compute_value_loss(
            theirs, batch.returns, batch.old_values, batch.mask, NEVER if clip is None else clip
        )
        name = f"verl compute_value_loss: {'clip 0.2' if clip else 'no clip'}"
        assert_equal(name, output.loss.detach(), loss.detach())
        assert_equal(name, torch.autograd.grad(output.loss, ours)[0], torch.autograd.grad(loss, theirs)[0])
