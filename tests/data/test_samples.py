"""From what was said to what is trained on: exactly the engine's ids, and a loss on nothing but the policy's own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.data.samples import to_samples
from sluice.types import Completion, Group, Outcome, Prompt, Sample, Trajectory, Turn


def a_turn(prompt_ids: list[int], token_ids: list[int], version: int = 0, temperature: float = 1.0) -> Turn:
    logprobs = [-token / 100 for token in token_ids]
    return Turn(prompt_ids, Completion(token_ids, logprobs, "stop", [version] * len(token_ids), temperature))


def a_trajectory(*turns: Turn, reward: float | None = 1.0, outcome: Outcome = "scored") -> Trajectory:
    return Trajectory(list(turns), outcome=outcome, reward=reward)


def a_group(*trajectories: Trajectory, id: int = 4, rejected: str = "") -> Group:
    return Group(id, Prompt("gsm8k:12", []), list(trajectories), rejected)


def columns(sample: Sample) -> tuple[list[int], list[float], list[float], list[int]]:
    return sample.token_ids, sample.loss_weights, sample.logprobs, sample.policy_versions


def test_one_turn():
    (sample,) = to_samples([a_group(a_trajectory(a_turn([3, 4], [50, 60], 7, 0.8), reward=0.25))])
    assert columns(sample) == ([3, 4, 50, 60], [0, 0, 1, 1], [0, 0, -0.5, -0.6], [-1, -1, 7, 7])
    assert (sample.temperature, sample.group, sample.index, sample.reward) == (0.8, 4, 0, 0.25)
    assert (sample.prompt_id, sample.name) == ("gsm8k:12", "gsm8k:12#4.0")
    assert (sample.advantages, sample.old_logprobs, sample.update) == ([], [], -1)


def test_a_turn_that_goes_on_extends_the_sample():
    """What the environment says in between bears no loss and was made by no policy; each token keeps its own version."""
    trajectory = a_trajectory(
        a_turn([3], [50], 1), a_turn([3, 50, 8, 9], [60, 70], 2), a_turn([3, 50, 8, 9, 60, 70], [80], 3)
    )
    (sample,) = to_samples([a_group(trajectory)])
    assert columns(sample) == (
        [3, 50, 8, 9, 60, 70, 80],
        [0, 1, 0, 0, 1, 1, 1],
        [0, -0.5, 0, 0, -0.6, -0.7, -0.8],
        [-1, 1, -1, -1, 2, 2, 3],
    )


@pytest.mark.parametrize(
    "second_prompt",
    [[3, 51, 8], [3], [9, 3, 50, 8], [7]],
    ids=["edited", "dropped", "shifted", "another"],
)
def test_a_broken_history_starts_a_sample_of_its_own(second_prompt: list[int]):
    """Both belong to one trajectory, with one index and one reward, so that the group counts it once."""
    first, second = to_samples([a_group(a_trajectory(a_turn([3], [50]), a_turn(second_prompt, [60]), reward=2.0))])
    assert columns(first)[:2] == ([3, 50], [0, 1])
    assert columns(second)[:2] == ([*second_prompt, 60], [0] * len(second_prompt) + [1])
    assert (first.index, first.reward) == (second.index, second.reward) == (0, 2.0)


def test_kept_ids_stand_at_the_tokens_that_were_drawn():
    """A turn whose sampler dropped nothing has empty lists between those that have some; never any, none at all."""
    first, second, third = a_turn([3], [50, 60]), a_turn([3, 50, 60, 8], [70]), a_turn([3, 50, 60, 8, 70, 9], [80])
    (whole,) = to_samples([a_group(a_trajectory(first, second, third))])
    assert whole.kept_ids == []
    first.completion.kept_ids, third.completion.kept_ids = [[50, 51], [60]], [[80, 90]]
    (sample,) = to_samples([a_group(a_trajectory(first, second, third))])
    assert sample.kept_ids == [[], [50, 51], [60], [], [], [], [80, 90]]


def test_experts_are_those_of_the_first_forward_that_a_token_took_part_in():
    """The last token of a turn is fed in with the next one, which computes all before it again; its log-probs were made by what stood
    there first."""
    first, second = a_turn([3], [50, 60]), a_turn([3, 50, 60, 8], [70])
    first.completion.routed_experts = [b"a", b"b", b""]
    second.completion.routed_experts = [b"A", b"B", b"C", b"D", b""]
    (sample,) = to_samples([a_group(a_trajectory(first, second))])
    assert sample.routed_experts == [b"a", b"b", b"C", b"D", b""]
    second.completion.routed_experts = []
    (sample,) = to_samples([a_group(a_trajectory(first, second))])
    assert sample.routed_experts == [b"a", b"b", b"", b"", b""]


def test_after_a_break_the_newest_history_is_extended():
    trajectory = a_trajectory(a_turn([3], [50]), a_turn([4], [60]), a_turn([4, 60, 5], [70]))
    first, second = to_samples([a_group(trajectory)])
    assert first.token_ids == [3, 50]
    assert columns(second)[:2] == ([4, 60, 5, 70], [0, 1, 0, 1])


def test_a_turn_without_tokens_gives_nothing():
    """But what it was asked stays part of the history of the next."""
    empty = a_trajectory(a_turn([3], []))
    between = a_trajectory(a_turn([3], [50]), a_turn([3, 50, 8], []), a_turn([3, 50, 8, 9], [60]))
    (sample,) = to_samples([a_group(empty, between)])
    assert columns(sample)[:2] == ([3, 50, 8, 9, 60], [0, 1, 0, 0, 1])
    assert sample.index == 1


def test_only_scored_trajectories_of_kept_groups_are_trained_on():
    """An error is no zero (Z7), and the index stays the trajectory's place in its group (Z2)."""
    good = a_trajectory(a_turn([3], [50]), reward=0.5)
    kept = a_group(
        a_trajectory(a_turn([3], [51]), reward=None, outcome="error"),
        good,
        a_trajectory(a_turn([3], [52]), reward=None, outcome="timeout"),
        a_trajectory(a_turn([3], [53]), reward=None, outcome="pending"),
        good,
        id=9,
    )
    samples = to_samples([a_group(good, id=1, rejected="all rewards equal (0.5)"), kept, a_group(good, id=2)])
    assert [(s.group, s.index, s.token_ids) for s in samples] == [(9, 1, [3, 50]), (9, 4, [3, 50]), (2, 0, [3, 50])]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 3), max_size=3), st.lists(st.integers(0, 3), max_size=4), st.booleans()),
        min_size=1,
        max_size=5,
    )
)
def test_every_completion_token_is_trained_on_once_after_its_own_prompt(
    exchanges: list[tuple[list[int], list[int], bool]],
):
    """Whatever an agent does to its history: each loss token stands behind exactly the ids that the engine saw."""
    turns: list[Turn] = []
    history = [1]
    for version, (said, answer, forget) in enumerate(exchanges):
        history = [2, *said] if forget else history + said
        turns.append(a_turn(list(history), answer, version))
        history += answer
    seen: dict[tuple[int, int], list[int]] = {}
    for sample in to_samples([a_group(a_trajectory(*turns))]):
        places: dict[int, int] = {}
        for t, (weight, version) in enumerate(zip(sample.loss_weights, sample.policy_versions, strict=True)):
            assert (weight == 1.0) == (version >= 0)
            if weight:
                place = places[version] = places.get(version, -1) + 1
                assert (version, place) not in seen
                seen[version, place] = sample.token_ids[: t + 1]
                assert sample.logprobs[t] == turns[version].completion.logprobs[place]
            else:
                assert sample.logprobs[t] == 0.0
    assert seen == {
        (v, i): turn.prompt_ids + turn.completion.token_ids[: i + 1]
        for v, turn in enumerate(turns)
        for i in range(len(turn.completion.token_ids))
    }


def test_to_samples_leaves_the_trajectory_alone():
    """The same lists in a turn and in a sample would let one change the other."""
    turn = a_turn([3], [50])
    (sample,) = to_samples([a_group(a_trajectory(turn))])
    sample.token_ids.append(1)
    sample.logprobs.append(1.0)
    assert (turn.prompt_ids, turn.completion.token_ids, turn.completion.logprobs) == ([3], [50], [-0.5])


def test_a_token_that_its_sampler_had_dropped_is_refused():
    """Its log-prob would be -inf in the trainer, and the step's loss no number."""
    with pytest.raises(ValueError, match="token 1 is 2, which is not among its kept_ids"):
        Completion([1, 2], [0.0, 1.0], "stop", [0, 0], 1.0, kept_ids=[[], [1, 3]])


def test_lengths_are_checked_with_the_name_of_the_sample():
    with pytest.raises(ValueError, match=r"Sample p#4\.2: fields must have one length, got .*'logprobs': 1"):
        Sample([1, 2], [0.0, 1.0], [0.0], [0, 0], 1.0, 4, 2, prompt_id="p")
    with pytest.raises(ValueError, match="Completion: fields must have one length"):
        Completion([1, 2], [0.0, 1.0], "stop", [0], 1.0)
    with pytest.raises(ValueError, match=r"Completion: fields must have one length, got .*'kept_ids': 1"):
        Completion([1, 2], [0.0, 1.0], "stop", [0, 0], 1.0, kept_ids=[[1]])
    with pytest.raises(ValueError, match=r"Sample group#4\.2: fields must have one length, got .*'kept_ids': 1"):
        Sample([1, 2], [0.0, 1.0], [0.0, 0.0], [0, 0], 1.0, 4, 2, kept_ids=[[]])
    with pytest.raises(ValueError, match="routed_experts of 1 positions are fewer than its 2 tokens"):
        Completion([1, 2], [0.0, 1.0], "stop", [0, 0], 1.0, routed_experts=[b""])
    with pytest.raises(ValueError, match=r"Sample group#4\.2: fields must have one length, got .*'routed_experts': 1"):
        Sample([1, 2], [0.0, 1.0], [0.0, 0.0], [0, 0], 1.0, 4, 2, routed_experts=[b""])
    with pytest.raises(ValueError, match=r"Sample group#4\.2: the first token has no tokens before it"):
        Sample([1, 2], [1.0, 1.0], [0.0, 0.0], [0, 0], 1.0, 4, 2)
