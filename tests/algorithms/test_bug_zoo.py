"""Bugs that systems of this kind are known to have, each planted on purpose: what passes with sluice must fail with the bug.

A check that a planted bug survives is a check that proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import oracle_advantages as adv
import pytest
import torch
import words
from batches import COLUMNS, Batch, in_ranks, loss_and_gradients, ragged, row
from torch import Tensor

from sluice.algorithms import (
    ALGORITHMS,
    Algorithm,
    LossOutput,
    assign_advantages,
    compute_advantages,
    policy_loss,
    token_coefficients,
    why_rejected,
)
from sluice.data.samples import to_samples
from sluice.tracking.metrics import Mean, Metrics
from sluice.types import Completion, Group, Prompt, Trajectory, Turn

Compute = Callable[[Tensor, Tensor, Algorithm], Tensor]


def catches(check: Callable[..., None], ours: Any, *planted: Any) -> None:
    check(ours)
    for bug in planted:
        with pytest.raises(AssertionError):
            check(bug)


def compute(rewards: Tensor, group_ids: Tensor, spec: Algorithm) -> Tensor:
    return compute_advantages(rewards, group_ids, spec, torch.ones(len(rewards)))


# Z1: with groups of uneven size, one baseline for the whole batch


def own_baselines(compute: Compute) -> None:
    rewards, groups = [1.0, 0.0, 1.0, 1.0, 0.0], [5, 5, 5, 8, 8]
    found = compute(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), row("dr_grpo"))
    assert found.tolist() == pytest.approx(adv.by_group(adv.centre, rewards, groups))


def whole_batch_where_groups_are_uneven(rewards: Tensor, group_ids: Tensor, spec: Algorithm) -> Tensor:
    sizes = torch.unique(group_ids, return_counts=True)[1]
    if len(set(sizes.tolist())) == 1:
        grid = rewards.view(len(sizes), -1)
        return (grid - grid.mean(1, keepdim=True)).view(-1)
    return rewards - rewards.mean()


def test_z1_groups_of_uneven_size_keep_their_own_baselines():
    catches(own_baselines, compute, whole_batch_where_groups_are_uneven)


# Z2: after a filter, groups by where a sample stands


def own_group_after_a_filter(compute: Compute) -> None:
    """Four groups of two, of which the second lost one member and the third went whole."""
    rewards = [1.0, 0.0, 3.0, 8.0, 4.0, 5.0, 9.0, 1.0]
    kept = [0, 1, 3, 6, 7]
    ids = [i // 2 for i in kept]
    found = compute(torch.tensor([rewards[i] for i in kept], dtype=torch.float64), torch.tensor(ids), row("dr_grpo"))
    assert found.tolist() == [0.5, -0.5, 0.0, 4.0, -4.0]


def by_position(rewards: Tensor, group_ids: Tensor, spec: Algorithm) -> Tensor:
    return compute(rewards, torch.arange(len(rewards)) // 2, spec)


def by_id_as_an_index(rewards: Tensor, group_ids: Tensor, spec: Algorithm) -> Tensor:
    """Sums per id divided by the number of ids up to the largest, not by how many bear the id."""
    num = int(group_ids.max()) + 1
    sums = torch.zeros(num, dtype=rewards.dtype).index_add(0, group_ids, rewards)
    return rewards - (sums / (len(rewards) / num))[group_ids]


def test_z2_after_a_filter_samples_are_compared_with_their_own_group():
    catches(own_group_after_a_filter, compute, by_position, by_id_as_an_index)


# Z3: the scale of the loss depends on how the update is cut


def same_scale_however_cut(aggregation: str) -> Callable[[Any], None]:
    spec = row("grpo", aggregation=aggregation)
    batch = ragged([(6, 1.0), (1, -2.0), (2, 0.5), (1, 3.0)], 0.05)
    _, whole, _ = loss_and_gradients(spec, batch)

    def check(gradients: Callable[..., list[Tensor]]) -> None:
        """Of micro-batches (or ranks) with one, with two, and with uneven numbers of sequences."""
        for cut in ([[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0], [1, 2, 3]]):
            pieces = [batch.sequence(*part) for part in cut]
            found = torch.zeros_like(whole)
            for tokens, gradient in zip(pieces, gradients(spec, batch, pieces)):
                found[tokens] = gradient
            torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-15)

    return check


def with_coefficients_of_the_update(spec: Algorithm, batch: Batch, pieces: list[Tensor]) -> list[Tensor]:
    coefficients = token_coefficients(spec, batch.loss_weights, batch.sequence_ids, batch.group_ids)
    return [loss_and_gradients(spec, batch.select(tokens), coefficients[tokens])[1] for tokens in pieces]


def with_coefficients_of_all_ranks(spec: Algorithm, batch: Batch, pieces: list[Tensor]) -> list[Tensor]:
    def work(rank: int, reduce: Any) -> Tensor:
        mine = batch.select(pieces[rank])
        coefficients = token_coefficients(spec, mine.loss_weights, mine.sequence_ids, mine.group_ids, reduce)
        return loss_and_gradients(spec, mine, coefficients)[1]

    return in_ranks(len(pieces), work)


def mean_of_the_means_of_micro_batches(spec: Algorithm, batch: Batch, pieces: list[Tensor]) -> list[Tensor]:
    """Each piece a mean of its own, divided by their number: the wrong of loss.backward() / accumulation_steps, and of DDP."""
    return [loss_and_gradients(spec, batch.select(tokens))[1] / len(pieces) for tokens in pieces]


def sum_of_the_means_of_micro_batches(spec: Algorithm, batch: Batch, pieces: list[Tensor]) -> list[Tensor]:
    return [loss_and_gradients(spec, batch.select(tokens))[1] for tokens in pieces]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant", "blend"])
def test_z3_the_scale_does_not_depend_on_micro_batches_or_ranks(aggregation: str):
    check = same_scale_however_cut(aggregation)
    bugs = mean_of_the_means_of_micro_batches, sum_of_the_means_of_micro_batches
    catches(check, with_coefficients_of_the_update, *bugs)
    catches(check, with_coefficients_of_all_ranks, *bugs)


# Z4: masked tokens leak, or their weights lose their fractions


def only_weighted_tokens(loss: Callable[..., LossOutput]) -> None:
    """-inf stands at masked tokens, as log-probs of tokens that a sampler may not draw do; weights are fractions."""
    batch = ragged([(3, 1.0), (2, -2.0)], 0.1, [1.0, 0.0, 0.5, 0.25, 0.0])
    own = batch.loss_weights != 0
    dirty = replace(batch, **{k: torch.where(own, getattr(batch, k), -math.inf) for k in ("logprobs", "old_logprobs")})
    found, gradient, _ = loss_and_gradients(row("grpo"), dirty, loss=loss)
    r = math.exp(0.1)
    expected = -((1.0 * r + 0.5 * r) / 1.5 + -2.0 * r) / 2
    assert float(found.loss) == pytest.approx(expected, rel=1e-12)
    assert gradient[~own].tolist() == [0.0, 0.0]
    assert bool(torch.isfinite(gradient).all())


def a_loss(
    weigh: Callable[[Tensor, Tensor], Tensor], prepare: Callable[[Tensor, Tensor], Tensor] = lambda x, own: x
) -> Callable[..., LossOutput]:
    """A GRPO loss whose masking is the only thing that may be wrong."""

    def loss(spec: Any, logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, ids: Tensor, **_: Any):
        own = weights != 0
        ratio = torch.exp(prepare(logprobs - old, own))
        per_token = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        c = token_coefficients(spec, weights, ids)
        return LossOutput(weigh(per_token, c).sum(), per_token, ratio, own, Metrics())

    return loss


def int_weights(spec: Any, logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, *rest: Any, **more: Any):
    return policy_loss(spec, logprobs, old, advantages, weights.int().to(weights.dtype), *rest, **more)


def test_z4_masked_tokens_leak_nothing_and_weights_keep_their_fractions():
    catches(
        only_weighted_tokens,
        policy_loss,
        a_loss(lambda per_token, c: per_token * c),  # nan · 0
        a_loss(lambda per_token, c: torch.where(c != 0, per_token * c, 0.0)),  # right in value, nan in the gradient
        int_weights,
    )
    # and right where the masked tokens are taken out before anything is computed from them
    catches(only_weighted_tokens, a_loss(lambda p, c: p * c, lambda x, own: torch.where(own, x, 0.0)))


# Z13: an option that does nothing


idle_words = cache(words.idle_words)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_z13_each_word_of_a_row_does_something_or_is_refused(name: str):
    idle, acting = idle_words(name)
    assert not idle
    assert len(acting) > 15


def test_z13_each_word_acts_in_some_row():
    acting = set().union(*(idle_words(name)[1] for name in ALGORITHMS))
    assert acting == {word for word, _ in words.alternatives()}


IGNORED = {
    "dual_clip": ("ppo", None),
    "ratio_min": ("cispo", None),
    "correction_min": ("grpo", None),
    "rejection": ("grpo", "none"),
    "entropy_coef": ("glm", 0.0),
    "tv_low": ("dppo", 0.15),
    "token_share": ("grpo", 0.5),
}


@pytest.mark.parametrize(("word", "name", "fixed"), [(w, n, f) for w, (n, f) in IGNORED.items()])
def test_z13_a_loss_that_ignores_a_word_is_noticed(word: str, name: str, fixed: Any):
    def deaf(spec: Algorithm, *rest: Any, **more: Any) -> LossOutput:
        return policy_loss(replace(spec, **{word: fixed}), *rest, **more)

    idle, _ = words.idle_words(name, SimpleNamespace(policy_loss=deaf, assign_advantages=assign_advantages))
    assert any(f": {word}=" in line for line in idle)


@pytest.mark.parametrize(
    ("word", "name", "fixed"),
    [("std_ddof", "grpo", 1), ("gae_lambda", "ppo", 1.0), ("gamma", "grpo", 1.0), ("normalise", "dr_grpo", "none")],
)
def test_z13_advantages_that_ignore_a_word_are_noticed(word: str, name: str, fixed: Any):
    def deaf(spec: Algorithm, samples: Any) -> None:
        used = getattr(spec, word) is not None
        assign_advantages(replace(spec, **{word: fixed}) if used else spec, samples)

    idle, _ = words.idle_words(name, SimpleNamespace(policy_loss=policy_loss, assign_advantages=deaf))
    assert any(f": {word}=" in line for line in idle)


# Z14: a check that is true by construction


def kl_tells_off_policy_from_fresh(loss: Callable[..., LossOutput]) -> None:
    for log_ratio in (0.0, 0.2, -0.3):
        output, *_ = loss_and_gradients(row("grpo"), ragged([(3, 1.0), (1, -1.0)], log_ratio), loss=loss)
        assert output.metrics["train/ppo_kl"].value() == pytest.approx(-log_ratio)


def against_itself(spec: Any, logprobs: Tensor, old: Tensor, *rest: Any, **more: Any) -> LossOutput:
    """The log-probs of this very pass in the place of the old ones: the KL is 0 whatever the policy became."""
    output = policy_loss(spec, logprobs, old, *rest, **more)
    zero = Mean((logprobs.detach() - logprobs).sum().detach(), len(logprobs))
    return replace(output, metrics=Metrics({**output.metrics, "train/ppo_kl": zero}))


def always_on_policy(spec: Any, logprobs: Tensor, old: Tensor, *rest: Any, **more: Any) -> LossOutput:
    """The same mistake in the ratio itself: it is 1, and nothing is ever clipped."""
    return policy_loss(spec, logprobs, logprobs.detach(), *rest, **more)


def test_z14_the_kl_to_the_old_policy_is_measured():
    catches(kl_tells_off_policy_from_fresh, policy_loss, against_itself, always_on_policy)


# Z15: an error is scored, and trained on


def a_group(*rewards: float | None) -> Group:
    """`None`: the reward function raised."""

    def attempt(reward: float | None) -> Trajectory:
        turns = [Turn([1, 2], Completion([3, 4], [-1.0, -1.0], "stop", [0, 0], 1.0))]
        return Trajectory(turns, outcome="error" if reward is None else "scored", reward=reward)

    return Group(3, Prompt("p", []), [attempt(reward) for reward in rewards])


def errors_are_no_scores(settle: Callable[[Group], Group]) -> None:
    """`settle` makes a group out of attempts of which some crashed."""
    for name in ("grpo", "dapo", "dr_grpo", "rloo", "reinforce"):
        spec = row(name)
        crashed = settle(a_group(None, None, None))
        crashed.rejected = why_rejected(spec, crashed)
        assert "0 of 3 samples scored" in crashed.rejected
        assert not to_samples([crashed])
        mixed = settle(a_group(1.0, None, 0.5))
        mixed.rejected = why_rejected(spec, mixed)
        samples = to_samples([mixed])
        assert len(samples) == 2
        assign_advantages(spec, samples)
        alone = to_samples([a_group(1.0, 0.5)])
        assign_advantages(spec, alone)
        assert [s.advantages for s in samples] == [s.advantages for s in alone]


def scored_as_0(group: Group) -> Group:
    for trajectory in group.trajectories:
        if trajectory.outcome == "error":
            trajectory.outcome, trajectory.reward = "scored", 0.0
    return group


def scored_as_the_mean(group: Group) -> Group:
    scores = [t.reward for t in group.scored]
    for trajectory in group.trajectories:
        if trajectory.outcome == "error":
            trajectory.outcome, trajectory.reward = "scored", sum(scores) / max(1, len(scores))
    return group


def test_z15_what_crashed_is_neither_scored_nor_trained_on():
    catches(errors_are_no_scores, lambda group: group, scored_as_0, scored_as_the_mean)


# Z19: sampler and trainer at different temperatures


def first_update_is_on_policy(trainer: Callable[[Tensor, float], Tensor]) -> None:
    """Fresh weights: whatever the sampler's temperature, the ratio is 1 and the KL 0."""
    logits = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 3.0], [1.0, -2.0, 0.3]], dtype=torch.float64)
    tokens = torch.tensor([[0], [1], [2]])
    for temperature in (1.0, 0.7):
        sampled = (logits / temperature).log_softmax(-1).gather(1, tokens)[:, 0]
        batch = replace(ragged([(3, 1.0)], 0.0), old_logprobs=sampled)
        batch.logprobs = trainer(logits, temperature).gather(1, tokens)[:, 0]
        output, *_ = loss_and_gradients(row("grpo"), batch)
        assert output.ratios.tolist() == pytest.approx([1.0] * 3, rel=1e-12)
        assert output.metrics["train/ppo_kl"].value() == pytest.approx(0.0, abs=1e-12)


def test_z19_a_trainer_at_another_temperature_shows_in_the_first_update():
    catches(
        first_update_is_on_policy,
        lambda logits, temperature: (logits / temperature).log_softmax(-1),
        lambda logits, temperature: logits.log_softmax(-1),
        lambda logits, temperature: (logits * temperature).log_softmax(-1),
    )


# Z20: the spread of one sample, or of equal rewards


def no_spread_no_advantage(compute: Compute) -> None:
    for name in ("grpo", "dr_grpo", "rloo"):
        for dtype in (torch.float32, torch.float64):
            for rewards in ([0.1] * 3, [0.1] * 7, [1 / 3] * 5, [0.7], [1e8 + 1 / 3] * 3):
                found = compute(torch.tensor(rewards, dtype=dtype), torch.tensor([2] * len(rewards)), row(name))
                assert found.tolist() == [0.0] * len(rewards)


def by_the_book(eps: float, correction: int) -> Compute:
    def compute(rewards: Tensor, group_ids: Tensor, spec: Algorithm) -> Tensor:
        mean = rewards.sum() / len(rewards)
        with_std = ((rewards - mean).square().sum() / max(len(rewards) - correction, 0)).sqrt()
        return (rewards - mean) / (with_std + eps)

    return compute


def test_z20_nothing_to_compare_gives_0():
    """0/0 of one sample is nan; the rounding of a mean of equal rewards over its own spread is of size 1."""
    catches(no_spread_no_advantage, compute, by_the_book(0.0, 1), by_the_book(1e-6, 0), by_the_book(1e-8, 0))


def test_the_columns_of_a_batch_are_all_there():
    """What `select` does not carry along would be checked against the wrong tokens."""
    batch = words.BATCH
    order = torch.randperm(len(batch.logprobs), generator=torch.Generator().manual_seed(0))
    chosen = batch.select(order)
    for name in set(COLUMNS) - {"sequence_ids"}:
        assert torch.equal(getattr(chosen, name), getattr(batch, name)[order])
    assert {k for k, v in vars(batch).items() if len(v) == len(batch.logprobs)} == set(COLUMNS)
