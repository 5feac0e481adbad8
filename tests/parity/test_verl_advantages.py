"""verl's advantages: of groups, whitened, with KL in the reward, and GAE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos

from parity.compare import assert_equal
from parity.peers_verl import EPS
from parity.ragged import SEEDS, Ragged, ragged, row
from sluice.algorithms import Algorithm, assign_advantages, compute_advantages, gae

UNEVEN = (2, 5, 3, 4)
DTYPES = [torch.float64, torch.float32]


def token_rewards(batch: Ragged, kl_coef: float = 0.0) -> Tensor:
    """[N, L] the reward at the last token that the policy wrote, and verl's KL penalty on every one."""
    last = (batch.mask.cumsum(-1) == batch.lengths[:, None]) & batch.own
    scores = torch.where(last, batch.rewards[:, None], 0.0)
    return core_algos.compute_rewards(scores, batch.old_logprobs * batch.mask, batch.ref_logprobs * batch.mask, kl_coef)


def from_samples(spec: Algorithm, batch: Ragged, field: str = "advantages") -> Tensor:
    """What a run computes: from samples, which hold their numbers in float64."""
    samples = batch.samples()
    assign_advantages(spec, samples)
    return batch.from_samples(samples, field)


def verl_whitened(whitened: Tensor, raw: Tensor, batch: Ragged) -> Tensor:
    """The same numbers with verl's divisor of every mean, n + 1e-8."""
    x, n = raw[batch.own], batch.mask.sum()
    mean = x.sum() / (n + EPS)
    variance = (x - mean).square().sum() / (n + EPS) * n / (n - 1)
    back = whitened * torch.sqrt(x.var() + 1e-8) + x.mean()
    return (back - mean) * torch.rsqrt(variance + 1e-8)


GROUPED: dict[str, tuple[Algorithm, Any, dict[str, Any]]] = {
    "z_score": (row("grpo"), core_algos.compute_grpo_outcome_advantage, {}),
    "centred": (row("dr_grpo"), core_algos.compute_grpo_outcome_advantage, {"norm_adv_by_std_in_grpo": False}),
    "leave_one_out": (row("rloo"), core_algos.compute_rloo_outcome_advantage, {}),
    "leave_one_out, vectorised": (row("rloo"), core_algos.compute_rloo_vectorized_outcome_advantage, {}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GROUPED)
def test_group_advantages_are_verls(name: str, dtype: torch.dtype):
    spec, function, settings = GROUPED[name]
    for seed in SEEDS:
        batch = ragged(seed, dtype, sizes=UNEVEN)
        theirs, _ = function(token_rewards(batch), batch.mask, batch.groups.numpy(), **settings)
        ours = compute_advantages(batch.rewards, batch.groups, spec)[:, None] * batch.mask
        assert_equal(f"verl {function.__name__}: {name}", ours, theirs)


def test_a_group_of_one_keeps_its_reward_in_verl():
    """verl takes mean 0 and standard deviation 1 for it, but not in the vectorised functions; sluice gives it 0."""
    batch = ragged(1, sizes=(1, 4))
    for name, (spec, function, settings) in GROUPED.items():
        theirs, _ = function(token_rewards(batch), batch.mask, batch.groups.numpy(), **settings)
        divisor = 1 + 1e-6 if name == "z_score" else 1.0
        expected = 0.0 if "vectorised" in name else float(batch.rewards[0]) / divisor
        assert float(theirs[0, 0]) == pytest.approx(expected, rel=1e-6)
        assert float(compute_advantages(batch.rewards, batch.groups, spec)[0]) == 0.0


def test_equal_rewards_leave_a_rounding_in_verl():
    """The mean of eight 0.1 is not 0.1 in float32, and the z-score divides the rounding by 1e-6; sluice gives exactly 0."""
    rewards = torch.full((8, 1), 0.1)
    rounding = float((rewards - rewards.mean()).abs().max())
    theirs, _ = core_algos.compute_grpo_outcome_advantage(
        rewards.clone(), torch.ones_like(rewards), torch.zeros(8).numpy()
    )
    assert rounding / 2e-6 < float(theirs.abs().max()) < rounding / 1e-6
    ours = compute_advantages(rewards[:, 0], torch.zeros(8, dtype=torch.int64), row("grpo"))
    assert ours.tolist() == [0.0] * 8


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_reinforce_plus_plus_is_verls(kl_coef: float):
    """With KL in the reward, each token bears the divergence from it on."""
    spec = row("reinforce_pp", kl_coef=kl_coef)
    for seed in SEEDS:
        batch = ragged(seed, sizes=UNEVEN)
        rewards = token_rewards(batch, kl_coef)
        theirs, raw = core_algos.compute_reinforce_plus_plus_outcome_advantage(
            rewards, batch.mask, AlgoConfig(gamma=1.0)
        )
        ours = verl_whitened(from_samples(spec, batch), raw, batch) * batch.mask
        assert_equal(f"verl reinforce_plus_plus: kl_coef {kl_coef:g}", ours, theirs)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_reinforce_plus_plus_with_a_baseline_is_verls(kl_coef: float):
    kl = {"kl": "reward", "kl_estimator": "k1", "kl_coef": kl_coef} if kl_coef else {}
    spec = row("reinforce_pp_baseline", **kl)
    for seed in SEEDS:
        batch = ragged(seed, sizes=UNEVEN)
        rewards = token_rewards(batch, kl_coef)
        theirs, _ = core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(
            rewards, batch.mask, batch.groups.numpy()
        )
        raw, _ = core_algos.compute_grpo_outcome_advantage(
            rewards, batch.mask, batch.groups.numpy(), norm_adv_by_std_in_grpo=False
        )
        ours = verl_whitened(from_samples(spec, batch), raw, batch) * batch.mask
        assert_equal(f"verl reinforce_plus_plus_baseline: kl_coef {kl_coef:g}", ours, theirs)


def test_kl_in_the_reward_of_a_group_is_verls():
    for name, (spec, function, settings) in GROUPED.items():
        spec = row(spec.name, kl="reward", kl_estimator="k1", kl_coef=0.1)
        for seed in SEEDS:
            batch = ragged(seed, sizes=UNEVEN)
            theirs, _ = function(token_rewards(batch, 0.1), batch.mask, batch.groups.numpy(), **settings)
            assert_equal(f"verl compute_rewards: {name}", from_samples(spec, batch), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (1.0, 0.0)])
def test_returns_of_gae_are_verls(gamma: float, lam: float, dtype: torch.dtype):
    """Both leave the environment's tokens out of the recursion."""
    for seed in SEEDS:
        batch = ragged(seed, dtype)
        rewards = token_rewards(batch)
        _, theirs = core_algos.compute_gae_advantage_return(rewards, batch.values, batch.mask, gamma, lam)
        ids = torch.arange(len(batch.mask))[:, None].expand_as(batch.mask)[batch.own]
        _, ours = gae(rewards[batch.own], batch.values[batch.own], ids, gamma, lam)
        assert_equal("verl compute_gae_advantage_return: returns", ours, theirs[batch.own])


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_whitened_advantages_of_gae_are_verls(kl_coef: float):
    spec = row("ppo", gamma=0.9, gae_lambda=0.5, kl_coef=kl_coef)
    for seed in SEEDS:
        batch = ragged(seed)
        rewards = token_rewards(batch, kl_coef)
        theirs, returns = core_algos.compute_gae_advantage_return(rewards, batch.old_values, batch.mask, 0.9, 0.5)
        ours = verl_whitened(from_samples(spec, batch), returns - batch.old_values, batch)
        name = f"verl compute_gae_advantage_return: kl_coef {kl_coef:g}"
        assert_equal(name, ours[batch.own], theirs[batch.own])
        assert_equal(name, from_samples(spec, batch, "returns")[batch.own], returns[batch.own])
