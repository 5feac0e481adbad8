"""Each check alone: it leaves what the code makes alone, for every row and shape, and names what was planted."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sluice.algorithms import ALGORITHMS, Algorithm, assign_advantages, resolve
from sluice.checks import CHECKS
from sluice.data.batch import Layout, Packing, pack
from sluice.data.samples import to_samples
from sluice.types import Completion, Group, Prompt, Sample, Trajectory, Turn

GROUP_SIZE = 4


def some_groups(seed: int = 0, num: int = 5, first: int = 7) -> list[Group]:
    """Of one turn or two, with tickets that leave gaps, attempts without a score, and one group of equal rewards."""
    rng = random.Random(seed)

    def completion() -> Completion:
        length = rng.randint(1, 6)
        ids, logprobs = [rng.randrange(50) for _ in range(length)], [-rng.random() for _ in range(length)]
        return Completion(ids, logprobs, "stop", [3] * length, 0.7)

    def attempt(place: int, index: int) -> Trajectory:
        turns = [Turn([1, 2, 3], completion())]
        if index % 2:
            turns.append(Turn([1, 2, 3, *turns[0].completion.token_ids, 9], completion()))
        if (place, index) in ((1, 2), (2, 0)):
            return Trajectory(turns, "error", "error", error="boom")
        reward = 0.1 if place == 3 else rng.choice([0.0, 0.5, 1.0, rng.random()])
        return Trajectory(turns, "stop", "scored", reward)

    return [
        Group(first + 2 * place, Prompt(f"p{place}", []), [attempt(place, i) for i in range(GROUP_SIZE)])
        for place in range(num)
    ]


def row(name: str = "grpo", **words: Any) -> Algorithm:
    return resolve(name, words, max_new_tokens=16, group_size=GROUP_SIZE)


def filled(groups: list[Group], spec: Algorithm | None = None) -> list[Sample]:
    """Samples as they are before the first update."""
    rng = random.Random(1)
    samples = to_samples(groups)
    for sample in samples:
        sample.old_logprobs = list(sample.logprobs)
        sample.ref_logprobs = [x - 0.1 * rng.random() for x in sample.logprobs]
        sample.values = [0.3 * rng.random() for _ in sample.logprobs]
    assign_advantages(spec or row(), samples)
    return samples


# Groups


def whole(groups: list[Group], samples: list[Sample]) -> str:
    return CHECKS["groups_whole"](groups, samples, GROUP_SIZE)


@pytest.mark.parametrize("seed", range(5))
def test_samples_as_they_are_made_are_whole(seed: int):
    groups = some_groups(seed)
    assert whole(groups, to_samples(groups)) == ""
    groups[1].rejected = "a filter"
    groups.append(Group(30, Prompt("long", []), [], rejected="prompt too long"))
    assert whole(groups, to_samples(groups)) == ""


def test_an_edited_history_is_whole():
    """Two samples of one attempt."""
    (group,) = some_groups(num=1)
    group.trajectories[1].turns[1] = replace(group.trajectories[1].turns[1], prompt_ids=[1, 4, 4, 4])
    samples = to_samples([group])
    assert len(samples) == GROUP_SIZE + 1
    assert whole([group], samples) == ""
    assert "attempt 1 of group 7 has turns [0, 1], and its samples have [0]" in whole(
        [group], samples[:2] + samples[3:]
    )


PLANTED: dict[str, tuple[Callable[[Sample], Sample], str]] = {
    "group": (lambda s: replace(s, group=8), "belongs to no scored attempt of a group"),
    "index": (lambda s: replace(s, index=9), "belongs to no scored attempt of a group"),
    "failed": (lambda s: replace(s, group=9, index=2), "belongs to no scored attempt of a group"),
    "prompt": (lambda s: replace(s, prompt_id="p4"), "is of prompt p4, and its group of prompt p0"),
    "reward": (lambda s: replace(s, reward=5.0), "its reward is 5.0"),
    "prompt ids": (lambda s: replace(s, token_ids=[9, *s.token_ids[1:]]), "its tokens are not those"),
    "token ids": (lambda s: replace(s, token_ids=[*s.token_ids[:-1], 51]), "its tokens are not those"),
    "log-probs": (lambda s: replace(s, logprobs=s.logprobs[::-1]), "its log-probs are not those"),
    "versions": (lambda s: replace(s, policy_versions=[v - (v > 0) for v in s.policy_versions]), "policy versions"),
    "prompt is own": (lambda s: replace(s, policy_versions=[3] * len(s)), "of its tokens, and"),
    "temperature": (lambda s: replace(s, temperature=1.0), "its temperature is 1.0, and that of turn 0 0.7"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_sample_that_is_mixed_up_is_named(name: str):
    groups = some_groups()
    first, *others = to_samples(groups)
    change, said = PLANTED[name]
    assert said in whole(groups, [change(first), *others])


def test_what_is_missing_from_a_group_is_told():
    groups = some_groups()
    samples = to_samples(groups)
    assert "attempt 0 of group 7 has turns [0], and its samples have []" in whole(groups, samples[1:])
    assert "has turns [0], and its samples have [0, 0]" in whole(groups, [samples[0], *samples])
    groups[2].trajectories.pop()
    assert "group 11 (prompt p2) has 3 attempts, not 4" in whole(groups, samples)


def test_tickets_come_once_in_order_and_none_is_left_out():
    check, groups = CHECKS["trained_once"], [Group(i, Prompt("p", []), []) for i in range(6)]
    groups[1].rejected = groups[4].rejected = "equal rewards"
    assert check(groups, -1) == ""
    assert check([*groups[2:4], groups[5], groups[4]], 1) == "", "rejected ones are told in any order"
    assert "group 2 (prompt p) was taken after group 2" in check(groups[2:], 2)
    assert "group 2 (prompt p) was taken after group 3" in check([groups[0], groups[1], groups[3], groups[2]], -1)
    assert "group 0 (prompt p) was taken after group 0" in check([groups[0], groups[0]], -1)
    assert "group 1 was neither trained nor rejected, and group 5" in check([g for g in groups if g.id != 1], -1)
    assert "group 0 was neither trained nor rejected" in check(groups[1:], -1)


def test_staleness_is_that_of_the_oldest_token():
    groups = some_groups()
    groups[1].trajectories[3].turns[1].completion.policy_versions[-1] = 1
    assert CHECKS["staleness"](groups, 3, 2) == ""
    assert "group 9 (prompt p1) was sampled 2 versions ago" in CHECKS["staleness"](groups, 3, 1)
    groups[1].rejected = "a filter"
    assert CHECKS["staleness"](groups, 3, 0) == ""


def test_the_budget_of_outcomes_is_over_all_attempts():
    groups = some_groups()
    assert CHECKS["outcome_budget"](groups, 0.1) == "", "2 of 20"
    groups[4].rejected = "1 of 4 samples scored"
    for trajectory in groups[4].trajectories[1:]:
        trajectory.outcome, trajectory.error = "timeout", "no end"
    assert CHECKS["outcome_budget"](groups, 0.25) == ""
    assert "5 of 20 attempts have no score (3 of them ran out of time)" in CHECKS["outcome_budget"](groups, 0.24)
    assert CHECKS["outcome_budget"]([], 0.0) == ""


@pytest.mark.parametrize("position", [0, 3])
def test_a_loss_weight_of_the_wrong_token_is_named(position: int):
    """Token 0 is of the prompt, token 3 the policy's first."""
    samples = to_samples(some_groups())
    for sample in samples:
        sample.loss_weights = [0.5 * weight for weight in sample.loss_weights]
    assert CHECKS["loss_mask"](samples) == ""
    samples[2].loss_weights[position] = 0.0 if position else 1.0
    assert f"sample {samples[2].name}, token {position}: a loss weight of" in CHECKS["loss_mask"](samples)


# Updates

VARIED = [
    *(resolve(name, {}, max_new_tokens=16, group_size=GROUP_SIZE) for name in ALGORITHMS),
    row("grpo", credit="turn"),
    row("grpo", normalise="batch_std"),
    row("dr_grpo", normalise="whiten"),
    row("rloo", kl_coef=0.1),
    row("reinforce_pp", kl_coef=0.1),
    row("reinforce", normalise="whiten", credit="turn"),
]


@pytest.mark.parametrize("spec", VARIED, ids=lambda spec: f"{spec.name} {spec.normalise} {spec.credit} {spec.kl_coef}")
@pytest.mark.parametrize("seed", [0, 1])
def test_advantages_as_they_are_computed_hold(spec: Algorithm, seed: int):
    """Also where rewards are large, or differ by a rounding."""
    for scale, offset in ((1.0, 0.0), (1e6, -3e5), (1e-9, 1.0)):
        groups = some_groups(seed)
        for trajectory in (t for group in groups for t in group.scored):
            trajectory.reward = (trajectory.reward or 0.0) * scale + offset
        groups[0].trajectories[0].reward, groups[0].trajectories[1].reward = 0.1 + 0.2, 0.3
        assert CHECKS["advantages"](spec, filled(groups, spec)) == ""


def shifted(sample: Sample, by: float) -> None:
    sample.advantages = [
        a + by * (weight != 0) for a, weight in zip(sample.advantages, sample.loss_weights, strict=True)
    ]


@pytest.mark.parametrize("spec", [s for s in VARIED if not s.needs_values or s.normalise == "whiten"], ids=str)
def test_advantages_of_other_samples_are_told(spec: Algorithm):
    samples = filled(some_groups(), spec)
    shifted(samples[0], 0.5)
    assert CHECKS["advantages"](spec, samples)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce", "reinforce_pp", "reinforce_pp_baseline"])
def test_advantages_that_point_the_wrong_way_are_told(name: str):
    """Their sums and means are as promised."""
    samples = filled(some_groups(), row(name))
    for sample in samples:
        sample.advantages = [-a for a in sample.advantages]
    assert "a reward of" in CHECKS["advantages"](row(name), samples)


def test_an_advantage_of_a_single_token_is_told():
    samples = filled(some_groups())
    samples[1].advantages[-1] += 0.25
    assert "its advantage is not that of the other tokens" in CHECKS["advantages"](row(), samples)
    samples = filled(some_groups())
    samples[1].advantages[0] = 0.25
    assert "where there is no loss" in CHECKS["advantages"](row(), samples)


@pytest.mark.parametrize("layout", ["rows", "packed"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "prompt_mean", "constant", "blend"])
def test_the_scale_is_that_of_the_aggregation(aggregation: str, layout: Layout):
    spec = row("grpo", aggregation=aggregation)
    samples = filled(some_groups())
    samples[3].loss_weights = [0.5 * weight for weight in samples[3].loss_weights]
    minibatches = pack(samples, Packing(3, 30, layout), spec)
    assert max(len(minibatch.micro_batches) for minibatch in minibatches) > 1
    assert CHECKS["loss_scale"](spec, samples, minibatches) == ""
    for other in {"token_mean", "sequence_mean", "prompt_mean", "constant", "blend"} - {aggregation}:
        assert "promises it" in CHECKS["loss_scale"](row("grpo", aggregation=other), samples, minibatches), other
    minibatches[1].micro_batches[0].coefficients[:1] *= 1.01
    assert "in update 1, and aggregation" in CHECKS["loss_scale"](spec, samples, minibatches)


def test_a_sample_that_is_left_out_or_comes_twice_is_told():
    samples = filled(some_groups())
    minibatches = pack(samples, Packing(3, 30, "rows"), row())
    assert f"sample {samples[0].name} is in 0 micro-batches" in CHECKS["loss_scale"](row(), samples, minibatches[1:])
    assert "is in 2 micro-batches" in CHECKS["loss_scale"](row(), samples, [*minibatches, minibatches[-1]])


FIELDS = ["loss_weights", "logprobs", "old_logprobs", "ref_logprobs", "values", "advantages"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_finite_number_is_named(field: str, bad: float):
    samples = filled(some_groups())
    assert CHECKS["finite"](samples) == ""
    getattr(samples[3], field)[-1] = bad
    place = f"sample {samples[3].name}, token {len(samples[3]) - 1}"
    assert CHECKS["finite"](samples) == f"{place}: {field} is {bad:g}"


def test_positive_log_probs_and_rewards_that_are_no_numbers():
    samples = filled(some_groups())
    samples[0].old_logprobs = samples[0].logprobs = [*samples[0].logprobs[:-1], 1e-6]
    assert CHECKS["finite"](samples) == ""
    samples[0].logprobs[-1] = 0.1
    assert "logprobs is 0.1" in CHECKS["finite"](samples)
    samples[0].reward = float("nan")
    assert "a reward of nan" in CHECKS["finite"](samples)


def seen(difference: float = 0.0) -> list[Sample]:
    """After the first update of two, which took the first half."""
    samples = to_samples(some_groups())
    for sample in samples[: len(samples) // 2]:
        sample.update, sample.old_logprobs = 0, sample.logprobs
        sample.current_logprobs = [x - difference for x in sample.logprobs]
    return samples


def ratio(samples: list[Sample], version: int = 3, tolerance: float = 1e-3) -> str:
    for sample in samples:
        sample.old_logprobs = sample.old_logprobs or sample.logprobs
    return CHECKS["first_update_ratio"](samples, version, tolerance)


def test_engine_and_trainer_may_differ_by_the_tolerance():
    assert ratio(seen()) == ""
    assert ratio(seen(0.9e-3)) == ""
    assert "differ by 0.0011 nats in the mean over 9 samples (at most 0.001)" in ratio(seen(1.1e-3))
    assert ratio(seen(float("nan")))


def test_a_single_sample_with_the_log_probs_of_another_stands_out():
    samples = seen()
    samples[4].current_logprobs = [x - 0.0055 for x in samples[4].logprobs]
    assert f"of sample {samples[4].name} (at most 0.005)" in ratio(samples)


def test_samples_of_older_weights_are_left_out():
    assert ratio(seen(1.0), version=4) == ""
    samples = seen(1.0)
    for sample in samples[1:]:
        sample.policy_versions[-1] = 2
    assert "over 1 samples" in ratio(samples)


def test_a_single_token_stands_out_of_a_long_sample():
    """A token that was never sampled, in a mean over hundreds."""
    samples = seen()
    long = samples[0]
    for name in ("token_ids", "loss_weights", "logprobs", "policy_versions", "current_logprobs", "old_logprobs"):
        column = getattr(long, name)
        setattr(long, name, [*column, *([column[-1]] * 100_000)])
    assert ratio(samples) == ""
    long.current_logprobs = [*long.current_logprobs[:-1], long.logprobs[-1] - 5.0]
    assert "differ by 5 nats (at most 0.1)" in ratio(samples)


def test_recomputed_log_probs_are_compared_for_all_samples():
    samples = seen()
    samples[-1].old_logprobs = [x - 1.0 for x in samples[-1].logprobs]
    assert "before it their log-probs differ by 1 nats in the mean over 1 samples" in ratio(samples)


def test_a_trainer_without_log_probs_has_nothing_to_compare():
    """The critic alone learns in the first steps."""
    assert ratio(to_samples(some_groups())) == ""


def test_weights_match_by_their_fingerprints():
    assert CHECKS["weights_match"]("a", "a") == ""
    assert "weights a, and the trainer has published b" in CHECKS["weights_match"]("a", "b")
    assert CHECKS["weights_match"](None, "b")


def test_layouts_are_compared_token_by_token():
    samples = to_samples(some_groups())[:2]
    right = [list(sample.logprobs) for sample in samples]
    wrong = [right[0], [x - 0.1 * (weight != 0) for x, weight in zip(right[1], samples[1].loss_weights, strict=True)]]
    check = CHECKS["padded_packed"]
    assert check(samples, {"alone": right, "rows": right, "packed": right}, 1e-3) == ""
    said = check(samples, {"alone": right, "rows": right, "packed": wrong}, 1e-3)
    assert (
        f"of sample {samples[1].name} differ by 0.1 nats in the mean (at most 0.005) between alone and packed" in said
    )
    assert check(samples, {"alone": right, "rows": [[float("nan")] * len(x) for x in right]}, 1e-3)
