"""Advantages compare the samples of one group, told apart by its id, and are exactly 0 where there is nothing to compare."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from batches import in_ranks, modest, row
from hypothesis import given
from hypothesis import strategies as st

from sluice.algorithms import ALGORITHMS, Algorithm, assign_advantages, compute_advantages, why_rejected
from sluice.algorithms.advantages import whiten
from sluice.types import Completion, Group, Prompt, Sample, Trajectory, Turn

Z_SCORE, CENTRED, RAW, OTHERS = row("grpo"), row("dr_grpo"), row("reinforce"), row("rloo")
BATCH_STD, WHITENED = row("dr_grpo", normalise="batch_std"), row("reinforce_pp_baseline")
ALL = {
    "z_score": Z_SCORE,
    "centred": CENTRED,
    "leave_one_out": OTHERS,
    "raw": RAW,
    "batch_std": BATCH_STD,
    "whiten": WHITENED,
}
each_spec = pytest.mark.parametrize("spec", ALL.values(), ids=ALL)
comparing = pytest.mark.parametrize(
    "spec", [s for s in ALL.values() if s is not RAW], ids=[n for n in ALL if n != "raw"]
)


def advantages(
    spec: Algorithm, rewards: list[float], groups: list[int], dtype: Any = torch.float64, counts: Any = None
) -> list[float]:
    counts = torch.tensor([1] * len(rewards) if counts is None else counts)
    return compute_advantages(
        torch.tensor(rewards, dtype=dtype), torch.tensor(groups, dtype=int), spec, counts
    ).tolist()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (RAW, [1.0, 0.0, 0.0, 1.0]),
        (CENTRED, [0.5, -0.5, -0.5, 0.5]),
        # std of {1, 0, 0, 1} over n - 1: sqrt(4 · 0.25 / 3)
        (Z_SCORE, [s * 0.5 / (math.sqrt(1 / 3) + 1e-6) for s in (1, -1, -1, 1)]),
        (row("grpo", std_eps=0.5), [s * 0.5 / (math.sqrt(1 / 3) + 0.5) for s in (1, -1, -1, 1)]),
        (row("grpo", std_ddof=0, std_eps=0.0), [1.0, -1.0, -1.0, 1.0]),
        # 1 - (0 + 0 + 1) / 3
        (OTHERS, [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        (BATCH_STD, [s * 0.5 / (math.sqrt(1 / 3) + 1e-6) for s in (1, -1, -1, 1)]),
        (WHITENED, [s * 0.5 / math.sqrt(1 / 3 + 1e-8) for s in (1, -1, -1, 1)]),
    ],
    ids=["raw", "centred", "z_score", "z_score_eps", "z_score_ddof", "leave_one_out", "batch_std", "whiten"],
)
def test_by_hand(spec: Algorithm, expected: list[float]):
    assert advantages(spec, [1.0, 0.0, 0.0, 1.0], [5, 5, 5, 5]) == pytest.approx(expected, rel=1e-14)


def test_groups_of_uneven_size_keep_their_own_baselines():
    """Z1: sizes 3, 2 and 1, interleaved, with ids that neither start at 0 nor follow each other."""
    rewards = [3.0, 10.0, 6.0, 0.0, 20.0, 7.0]
    groups = [40, 2, 40, 40, 2, 11]
    assert advantages(CENTRED, rewards, groups) == [0.0, -5.0, 3.0, -3.0, 5.0, 0.0]
    root = math.sqrt(50) + 1e-6
    expected = [0.0, -5 / root, 3 / (3 + 1e-6), -3 / (3 + 1e-6), 5 / root, 0.0]
    assert advantages(Z_SCORE, rewards, groups) == pytest.approx(expected, rel=1e-14)


def test_batch_std_is_one_scale_for_all_groups():
    """ScaleRL: groups of little spread stay small beside others, where z_score would make them equals."""
    rewards, groups = [0.0, 0.2, 5.0, 9.0, 4.0, 4.0], [1, 1, 2, 2, 3, 3]
    centred = [-0.1, 0.1, -2.0, 2.0, 0.0, 0.0]
    std = math.sqrt((2 * 0.01 + 2 * 4) / 5)
    found = advantages(BATCH_STD, rewards, groups)
    assert found == pytest.approx([c / (std + 1e-6) for c in centred], rel=1e-12)
    assert found[4:] == [0.0, 0.0]


def test_whitening_counts_tokens_and_not_answers():
    """Advantages 0.5 and -0.5 with one and three tokens: mean -0.25, variance 4 · 0.1875 / 3."""
    found = advantages(WHITENED, [1.0, 0.0], [0, 0], counts=[1, 3])
    assert found == pytest.approx([0.75 / math.sqrt(0.25 + 1e-8), -0.25 / math.sqrt(0.25 + 1e-8)], rel=1e-12)


def test_along_tokens_there_is_nothing_to_compute_from_rewards_alone():
    with pytest.raises(ValueError, match="gae"):
        advantages(row("ppo"), [1.0, 0.0], [0, 0])


@each_spec
@modest
@given(
    members=st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.1, -2.5]), st.integers(-3, 3)), min_size=1, max_size=12),
    data=st.data(),
)
def test_the_order_of_samples_does_not_matter(spec: Algorithm, members: list[tuple[float, int]], data: st.DataObject):
    """Groups are told apart by id and not by position (Z2)."""
    order = data.draw(st.permutations(range(len(members))))
    rewards, groups = map(list, zip(*members, strict=True))
    counts = list(range(1, 1 + len(members)))
    before = advantages(spec, rewards, groups, counts=counts)
    after = advantages(spec, [rewards[i] for i in order], [groups[i] for i in order], counts=[counts[i] for i in order])
    assert after == pytest.approx([before[i] for i in order], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    "spec", [Z_SCORE, CENTRED, OTHERS, BATCH_STD], ids=["z_score", "centred", "others", "batch_std"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e-8, 1e8 + 1 / 3, -0.7])
def test_equal_rewards_give_exactly_0(spec: Algorithm, dtype: torch.dtype, reward: float):
    """Z20: the mean of three 0.1 is not 0.1, and z_score would divide that rounding by eps."""
    for size in (1, 2, 3, 7, 11):
        assert advantages(spec, [reward] * size + [5.0, 6.0], [1] * size + [0, 0], dtype)[:size] == [0.0] * size


@comparing
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rewards", [[0.1], [0.1, 0.1, 0.1], [1e8 + 1 / 3] * 7])
def test_a_batch_without_any_spread_gives_0(spec: Algorithm, rewards: list[float], dtype: torch.dtype):
    """Z20 over the whole batch: neither nan, as the std of one sample is, nor a rounding blown up."""
    assert advantages(spec, rewards, [3] * len(rewards), dtype) == [0.0] * len(rewards)


@each_spec
def test_rewards_are_left_as_they_are(spec: Algorithm):
    rewards = torch.tensor([1.0, 0.0, 2.0])
    given_out = compute_advantages(rewards, torch.tensor([0, 0, 0]), spec)
    given_out += 1
    assert rewards.tolist() == [1.0, 0.0, 2.0]


@each_spec
def test_no_samples_no_advantages(spec: Algorithm):
    assert advantages(spec, [], []) == []
    assign_advantages(spec, [])


# identities

some_groups = st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.1, -2.5]), st.integers(0, 2)), min_size=1, max_size=12)


@modest
@given(members=some_groups)
def test_z_scores_are_centred_rewards_scaled_per_group(members: list[tuple[float, int]]):
    rewards, groups = map(list, zip(*members, strict=True))
    centred, scored = advantages(CENTRED, rewards, groups), advantages(Z_SCORE, rewards, groups)
    for group in set(groups):
        own = [i for i in range(len(groups)) if groups[i] == group]
        spread = torch.tensor([rewards[i] for i in own], dtype=torch.float64).std().item() if len(own) > 1 else 0.0
        assert [scored[i] * (spread + 1e-6) for i in own] == pytest.approx([centred[i] for i in own], abs=1e-12)


@modest
@given(members=some_groups)
def test_leave_one_out_is_centred_times_n_over_n_minus_1(members: list[tuple[float, int]]):
    rewards, groups = map(list, zip(*members, strict=True))
    centred, others = advantages(CENTRED, rewards, groups), advantages(OTHERS, rewards, groups)
    sizes = [groups.count(g) for g in groups]
    assert others == pytest.approx([c * n / max(n - 1, 1) for c, n in zip(centred, sizes)], abs=1e-12)


columns = st.lists(st.tuples(st.floats(-4, 4), st.sampled_from([0.0, 1.0, 3.0])), min_size=3, max_size=12)


@modest
@given(column=columns)
def test_whitening_gives_mean_0_and_variance_1_and_again_changes_nothing(column: list[tuple[float, float]]):
    values, weights = torch.tensor([*column, (-4.5, 2.0), (4.5, 2.0)], dtype=torch.float64).unbind(1)
    once = whiten(values, weights, 1)
    own = weights != 0
    total = weights.sum()
    assert float((weights * once)[own].sum()) == pytest.approx(0.0, abs=1e-10)
    assert float((weights * once * once)[own].sum() / (total - 1)) == pytest.approx(1.0, abs=1e-7)
    torch.testing.assert_close(whiten(once, weights, 1)[own], once[own], rtol=1e-7, atol=1e-9)


@each_spec
@modest
@given(members=some_groups, size=st.sampled_from([2, 3]))
def test_ranks_with_whole_groups_give_what_one_process_gives(spec: Algorithm, members: Any, size: int):
    """Statistics of the batch are those of all ranks (A11), also where a rank has no group at all."""
    rewards, groups = map(list, zip(*members, strict=True))
    counts = list(range(1, 1 + len(members)))
    where = [[i for i in range(len(groups)) if groups[i] % size == rank] for rank in range(size)]

    def work(rank: int, reduce: Any) -> list[float]:
        mine = where[rank]
        column = torch.tensor([rewards[i] for i in mine], dtype=torch.float64)
        ids = torch.tensor([groups[i] for i in mine], dtype=torch.int64)
        return compute_advantages(column, ids, spec, torch.tensor([counts[i] for i in mine]), reduce).tolist()

    expected = advantages(spec, rewards, groups, counts=counts)
    for mine, found in zip(where, in_ranks(size, work)):
        assert found == pytest.approx([expected[i] for i in mine], rel=1e-11, abs=1e-11)


# to the tokens of samples


def a_sample(group: int, index: int, reward: float, weights: list[float]) -> Sample:
    n = len(weights)
    return Sample(list(range(n)), weights, [0.0] * n, [0] * n, 1.0, group, index, reward)


def test_advantages_go_to_the_tokens_that_the_policy_wrote():
    samples = [a_sample(8, 0, 1.0, [0.0, 1.0, 0.0, 0.5]), a_sample(8, 1, 0.0, [0.0, 1.0])]
    assign_advantages(CENTRED, samples)
    assert [s.advantages for s in samples] == [[0.0, 0.5, 0.0, 0.5], [0.0, -0.5]]
    assert [s.reward for s in samples] == [1.0, 0.0]


def test_a_trajectory_in_several_samples_counts_once():
    """Its three samples would pull the mean from 0.5 to 0.75."""
    cut = [a_sample(8, 0, 1.0, [0.0, 1.0]) for _ in range(3)]
    other = a_sample(8, 1, 0.0, [0.0, 1.0])
    assign_advantages(CENTRED, [*cut, other])
    assert [s.advantages[1] for s in (*cut, other)] == [0.5, 0.5, 0.5, -0.5]


def test_the_same_index_in_another_group_is_another_trajectory():
    samples = [
        a_sample(group, index, reward, [0.0, 1.0])
        for group, index, reward in [(8, 0, 1.0), (9, 0, 5.0), (8, 1, 0.0), (9, 1, 9.0)]
    ]
    assign_advantages(CENTRED, samples)
    assert [s.advantages[1] for s in samples] == [0.5, -2.0, -0.5, 2.0]


# groups that carry nothing


def a_group(*rewards: float | None) -> Group:
    trajectories = [Trajectory([], "", "error" if r is None else "scored", r) for r in rewards]
    return Group(3, Prompt("p", []), trajectories)


DAPO = row("dapo")


@pytest.mark.parametrize(
    ("spec", "group", "reason"),
    [
        (DAPO, a_group(0.0, 1.0), ""),
        (DAPO, a_group(0.5, 0.5, 0.5), "all rewards equal (0.5)"),
        (DAPO, a_group(0.5, None, 0.5), "all rewards equal (0.5)"),
        (DAPO, a_group(0.5, None), "1 of 2 samples scored, 2 needed"),
        (DAPO, a_group(None, None), "0 of 2 samples scored, 2 needed"),
        (Z_SCORE, a_group(0.5, 0.5), ""),
        (Z_SCORE, a_group(0.5, None, None), "1 of 3 samples scored, 2 needed"),
        (CENTRED, a_group(0.5, None, None), "1 of 3 samples scored, 2 needed"),
        (RAW, a_group(0.5, None, None), ""),
        (RAW, a_group(None), "0 of 1 samples scored, 1 needed"),
        (RAW, a_group(1.0, 1.0), ""),
    ],
)
def test_why_rejected(spec: Algorithm, group: Group, reason: str):
    """Without dynamic sampling a group of equal rewards stays; what has no score is neither a 0 nor an equal reward."""
    assert why_rejected(spec, group) == reason


def test_turns_that_differ_carry_a_signal_though_their_sums_do_not():
    """With credit: turn each turn is compared; the sums of [1, 0] and [0, 1] are equal, and the second turns are not."""
    completion = Completion([1], [-0.1], "stop", [0], 1.0)
    trajectories = [
        Trajectory([Turn([5], completion, reward) for reward in rewards], "", "scored", sum(rewards))
        for rewards in ([1.0, 0.0], [0.0, 1.0])
    ]
    group = Group(3, Prompt("p", []), trajectories)
    assert why_rejected(row("dapo", credit="turn"), group) == ""
    assert why_rejected(row("dapo"), group) == "all rewards equal (1)"
    for trajectory in trajectories:
        trajectory.turns = trajectories[0].turns
    assert why_rejected(row("dapo", credit="turn"), group) == "all rewards equal (1)"


def test_whole_numbers_are_rewards_too():
    rewards, groups = torch.tensor([1, 0, 0, 1]), torch.tensor([7, 7, 9, 9])
    assert compute_advantages(rewards, groups, ALGORITHMS["dr_grpo"]).tolist() == [0.5, -0.5, -0.5, 0.5]
