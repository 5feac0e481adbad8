"""TRL's losses, advantages and corrections, by the methods of its GRPO and RLOO trainers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from trl import GRPOTrainer, RLOOTrainer

from parity.compare import assert_equal, assert_same_loss
from parity.peers_trl import trl_loss, trl_rloo_loss, trl_rollout
from parity.ragged import MAX_TOKENS, SEEDS, Measured, ragged, row, sluice_loss
from parity.test_verl_corrections import factors
from sluice.algorithms import assign_advantages, compute_advantages
from sluice.algorithms.kl import kl_estimates

DTYPES = [torch.float64, torch.float32]

LOSSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "grpo": (row("grpo"), {}),
    "grpo with delta": (row("grpo", dual_clip=1.5), {"delta": 1.5}),
    "grpo with beta": (row("grpo", kl_coef=0.3), {"beta": 0.3}),
    "bnpo": (row("glm"), {"loss_type": "bnpo"}),
    "bnpo with entropy_coef": (row("glm", entropy_coef=0.2), {"loss_type": "bnpo", "entropy_coef": 0.2}),
    "dr_grpo": (row("dr_grpo"), {"loss_type": "dr_grpo", "max_completion_length": MAX_TOKENS}),
    "dapo": (row("dapo"), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo with beta": (row("dapo", kl_coef=0.3), {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.3}),
    "grpo, sequence level": (
        row("gspo"),
        {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "cispo": (row("cispo"), {"loss_type": "cispo", "epsilon_high": 5.0}),
    "sapo": (row("sapo", gate_negative=float(torch.tensor(1.05))), {"loss_type": "sapo"}),  # TRL holds it in float32
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_the_policy_loss_is_trls(name: str, dtype: torch.dtype):
    spec, settings = LOSSES[name]
    for seed in SEEDS:
        batch = ragged(seed, dtype, shared=spec.ratio == "sequence")
        assert_same_loss(f"trl _compute_loss: {name}", sluice_loss(spec, batch), trl_loss(batch, **settings))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_trl_counts_sequences_without_a_token(name: str):
    """Its means over sequences divide by all of the batch, sluice's by those that have a loss token; a token mean has no such choice."""
    spec, settings = LOSSES[name]
    batch = ragged(3)
    batch.mask[:2] = 0.0
    share = 1.0 if name == "dapo" else (len(batch.mask) - 2) / len(batch.mask)
    ours = sluice_loss(spec, batch, torch.tensor(share, dtype=torch.float64).expand(len(batch.mask)))
    assert_same_loss(f"trl, empty sequences: {name}", ours, trl_loss(batch, **settings))


def test_trl_takes_entropy_as_a_token_mean_in_every_loss():
    """sluice aggregates it as the loss: with a sequence mean the two bonuses are two different means."""
    spec = row("grpo", entropy_coef=0.2)
    batch = ragged(4)
    per_sequence = ((batch.entropies * batch.mask).sum(-1) / batch.lengths).mean()
    per_token = (batch.entropies * batch.mask).sum() / batch.mask.sum()
    difference = 0.2 * (per_sequence - per_token)
    assert abs(difference) > 1e-3
    theirs = trl_loss(batch, entropy_coef=0.2)
    assert_equal("trl entropy_coef: difference of two means", sluice_loss(spec, batch).loss + difference, theirs.loss)


def test_trls_corrected_kl_on_fresh_samples_is_k3_straight_through():
    """`use_bias_correction_kl`, TRL's default, multiplies k3 by the ratio r; with r = 1 the gradient of r·k3 is that of k2."""
    spec = row("glm", kl_coef=0.3, kl_estimator="k3_st")
    for seed in SEEDS:
        batch = ragged(seed)
        batch = replace(batch, old_logprobs=batch.logprobs)
        theirs = trl_loss(batch, loss_type="bnpo", beta=0.3, use_bias_correction_kl=True)
        assert_same_loss("trl use_bias_correction_kl, fresh: k3_st", sluice_loss(spec, batch), theirs)


def test_trls_corrected_kl_off_policy_is_k3_times_the_ratio():
    for seed in SEEDS:
        batch = ragged(seed)
        plain = sluice_loss(row("glm"), batch)
        logprobs = batch.logprobs.clone().requires_grad_()
        kl = (logprobs - batch.old_logprobs).exp() * kl_estimates("k3", logprobs, batch.ref_logprobs)
        mean = (kl * batch.mask).sum() / batch.mask.sum()
        (gradient,) = torch.autograd.grad(mean, logprobs)
        ours = Measured(plain.loss + 0.3 * mean.detach(), plain.gradient + 0.3 * gradient)
        theirs = trl_loss(batch, loss_type="bnpo", beta=0.3, use_bias_correction_kl=True)
        assert_same_loss("trl use_bias_correction_kl: r·k3", ours, theirs)


# advantages


@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_advantages_are_trls(scale_rewards: str):
    """Its std_eps is 1e-4. In float32, as its rewards are: it holds n / (n - 1) in float32 even where they are not."""
    spec = row("grpo", std_eps=1e-4) if scale_rewards == "group" else row("dr_grpo")
    for seed in SEEDS:
        batch = ragged(seed, torch.float32)
        theirs = trl_rollout(GRPOTrainer, batch, num_generations=4, scale_rewards=scale_rewards)["advantages"]
        ours = compute_advantages(batch.rewards, batch.groups, spec)
        assert_equal(f"trl scale_rewards: {scale_rewards}", ours, theirs)


def test_trls_batch_scaling_divides_by_the_spread_of_the_rewards():
    """sluice's batch_std, as ScaleRL, by that of the centred advantages: the ratio of the two is that of the two spreads."""
    spec = row("dr_grpo", normalise="batch_std", std_eps=1e-4)
    for seed in SEEDS:
        batch = ragged(seed, torch.float32)
        theirs = trl_rollout(GRPOTrainer, batch, num_generations=4, scale_rewards="batch")["advantages"]
        centred = compute_advantages(batch.rewards, batch.groups, row("dr_grpo"))
        spreads = (centred.std() + 1e-4) / (batch.rewards.std() + 1e-4)
        ours = compute_advantages(batch.rewards, batch.groups, spec)
        assert_equal("trl scale_rewards: batch, times the spreads", ours * spreads, theirs)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_rloo_advantages_are_trls(kl_coef: float):
    spec = row("rloo", kl_coef=kl_coef)
    for seed in SEEDS:
        batch = ragged(seed, holes=False)
        theirs = trl_rollout(RLOOTrainer, batch, num_generations=4, beta=kl_coef)["advantages"]
        samples = batch.samples()
        assign_advantages(spec, samples)
        ours = batch.from_samples(samples, "advantages")[:, 0]
        assert_equal(f"trl RLOOTrainer: kl_coef {kl_coef:g}", ours, theirs)


# RLOO's loss


def test_the_gradient_of_rloo_on_fresh_samples_is_trls():
    """TRL's loss is PPO's surrogate of the whole response's ratio, which is 1 there; sluice's row is A·Σ log π."""
    for seed in SEEDS:
        batch = ragged(seed, holes=False, shared=True)
        batch = replace(batch, old_logprobs=batch.logprobs)
        ours, theirs = sluice_loss(row("rloo"), batch), trl_rloo_loss(batch, batch.advantages[:, 0])
        assert_equal("trl RLOOTrainer: gradient on fresh samples", ours.gradient, theirs.gradient)


def test_trls_rloo_off_policy_is_ppo_on_the_ratio_of_the_whole_response():
    """Its gradient is sluice's times ρ = exp(Σ log π - Σ log π_old), or 0 where the surrogate bounds ρ."""
    scales = set()
    for seed in SEEDS:
        batch = ragged(seed, holes=False, shared=True)
        rho = ((batch.logprobs - batch.old_logprobs) * batch.mask).sum(-1).exp()
        advantages = batch.advantages[:, 0]
        bounded = ((advantages > 0) & (rho > 1.2)) | ((advantages < 0) & (rho < 0.8))
        scale = torch.where(bounded, 0.0, rho)
        scales |= set(scale.tolist())
        ours = sluice_loss(row("rloo"), batch, scale)
        assert_equal("trl RLOOTrainer: gradient, times ρ", ours.gradient, trl_rloo_loss(batch, advantages).gradient)
    assert 0.0 in scales
    assert len(scales) > 2


# corrections for the engine's log-probs


CORRECTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "token_truncate": ({"correction": "tis", "correction_max": 1.2}, {"vllm_importance_sampling_clip_max": 1.2}),
    "token_mask": ({"correction": "mis", "correction_max": 1.2}, {"vllm_importance_sampling_clip_max": 1.2}),
    "token_mask, both bounds": (
        {"correction": "icepop", "correction_min": 0.8, "correction_max": 1.2},
        {"vllm_importance_sampling_clip_min": 0.8, "vllm_importance_sampling_clip_max": 1.2},
    ),
    "sequence_truncate": (
        {"correction": "tis", "correction_level": "sequence", "correction_max": 2.0},
        {"vllm_importance_sampling_clip_max": 2.0},
    ),
    "sequence_mask": (
        {"correction": "mis", "correction_level": "sequence", "correction_max": 3.0},
        {"vllm_importance_sampling_clip_max": 3.0},
    ),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections_are_trls(name: str):
    words, settings = CORRECTIONS[name]
    mode = name.partition(",")[0]
    spec = row("dapo", **words)
    bounded = False
    for seed in SEEDS:
        batch = ragged(seed)
        rolled = trl_rollout(GRPOTrainer, batch, num_generations=4, vllm_importance_sampling_mode=mode, **settings)
        theirs = rolled["importance_sampling_ratio"].expand_as(batch.mask)
        ours = factors(spec, batch)
        assert_equal(f"trl vllm_importance_sampling_mode: {name}", ours, theirs * batch.mask)
        loss = trl_loss(batch, theirs, loss_type="dapo", epsilon_high=0.28)
        assert_same_loss(f"trl _compute_loss with {name}", sluice_loss(spec, batch), loss)
        bounded |= bool(((ours == 0) & batch.own).any()) or bool((ours == spec.correction_max).any())
    assert bounded
