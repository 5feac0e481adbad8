"""Advantages compare the samples of one group, told apart by its id, and are exactly 0 where there is nothing to compare."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from batches import modest
from hypothesis import given
from hypothesis import strategies as st

from sluice.algorithms import Algorithm, assign_advantages, compute_advantages, resolve, why_rejected
from sluice.types import Group, Prompt, Sample, Trajectory


def row(name: str, **words: Any) -> Algorithm:
    return resolve(name, words, max_new_tokens=48, group_size=4)


Z_SCORE, CENTRED, RAW = row("grpo"), row("dr_grpo"), row("reinforce")


def advantages(spec: Algorithm, rewards: list[float], groups: list[int], dtype: Any = torch.float64) -> list[float]:
    return compute_advantages(torch.tensor(rewards, dtype=dtype), torch.tensor(groups), spec).tolist()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (RAW, [1.0, 0.0, 0.0, 1.0]),
        (CENTRED, [0.5, -0.5, -0.5, 0.5]),
        # std of {1, 0, 0, 1} over n - 1: sqrt(4 · 0.25 / 3)
        (Z_SCORE, [s * 0.5 / (math.sqrt(1 / 3) + 1e-6) for s in (1, -1, -1, 1)]),
        (row("grpo", std_eps=0.5), [s * 0.5 / (math.sqrt(1 / 3) + 0.5) for s in (1, -1, -1, 1)]),
    ],
    ids=["raw", "centred", "z_score", "z_score_eps"],
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


@pytest.mark.parametrize("spec", [Z_SCORE, CENTRED, RAW], ids=["z_score", "centred", "raw"])
@modest
@given(
    members=st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.1, -2.5]), st.integers(-3, 3)), min_size=1, max_size=12),
    data=st.data(),
)
def test_the_order_of_samples_does_not_matter(spec: Algorithm, members: list[tuple[float, int]], data: st.DataObject):
    """Groups are told apart by id and not by position (Z2)."""
    order = data.draw(st.permutations(range(len(members))))
    rewards, groups = map(list, zip(*members, strict=True))
    before = advantages(spec, rewards, groups)
    after = advantages(spec, [rewards[i] for i in order], [groups[i] for i in order])
    assert after == pytest.approx([before[i] for i in order], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("spec", [Z_SCORE, CENTRED], ids=["z_score", "centred"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e-8, 1e8 + 1 / 3, -0.7])
def test_equal_rewards_give_exactly_0(spec: Algorithm, dtype: torch.dtype, reward: float):
    """Z20: the mean of three 0.1 is not 0.1, and z_score would divide that rounding by eps."""
    for size in (1, 2, 3, 7, 11):
        assert advantages(spec, [reward] * size + [5.0, 6.0], [1] * size + [0, 0], dtype)[:size] == [0.0] * size


@pytest.mark.parametrize("spec", [Z_SCORE, CENTRED, RAW], ids=["z_score", "centred", "raw"])
def test_rewards_are_left_as_they_are(spec: Algorithm):
    rewards = torch.tensor([1.0, 0.0, 2.0])
    given_out = compute_advantages(rewards, torch.tensor([0, 0, 0]), spec)
    given_out += 1
    assert rewards.tolist() == [1.0, 0.0, 2.0]


@pytest.mark.parametrize("spec", [Z_SCORE, CENTRED, RAW], ids=["z_score", "centred", "raw"])
def test_no_samples_no_advantages(spec: Algorithm):
    assert compute_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64), spec).tolist() == []
    assign_advantages(spec, [])


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
