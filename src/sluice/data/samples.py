"""From groups to training samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sluice.types import Group, Sample, Trajectory, Turn, join_kept_ids, join_routed_experts


def to_samples(groups: Sequence[Group]) -> list[Sample]:
    """The samples of every scored trajectory of every group that was not rejected, in group order."""
    return [
        sample
        for group in groups
        if not group.rejected
        for index, trajectory in enumerate(group.trajectories)
        if trajectory.outcome == "scored"
        for sample in _samples_of(group, index, trajectory)
    ]


def _samples_of(group: Group, index: int, trajectory: Trajectory) -> list[Sample]:
    """One sample per unbroken history: a turn whose prompt goes on from all ids before it extends the sample.

    An agent that edits its history breaks it, and the next turn starts a sample of its own.
    """
    samples: list[Sample] = []
    assert trajectory.reward is not None
    turn_rewards = [turn.reward for turn in trajectory.turns]
    if not any(turn_rewards):
        turn_rewards[-1] = trajectory.reward
    for number, turn in enumerate(trajectory.turns):
        if not turn.completion.token_ids:
            continue
        if samples and _goes_on(samples[-1], turn):
            samples[-1] = _extended(samples[-1], turn, number)
        else:
            start = Sample(
                token_ids=[],
                loss_weights=[],
                logprobs=[],
                policy_versions=[],
                temperature=turn.completion.temperature,
                group=group.id,
                index=index,
                reward=trajectory.reward,
                prompt_id=group.prompt.id,
                turn_rewards=turn_rewards,
            )
            samples.append(_extended(start, turn, number))
    return samples


def _goes_on(sample: Sample, turn: Turn) -> bool:
    """A sample has one temperature, since its log-probs are of the tempered policy."""
    history = turn.prompt_ids[: len(sample)]
    return history == sample.token_ids and turn.completion.temperature == sample.temperature


def _extended(sample: Sample, turn: Turn, number: int) -> Sample:
    given = turn.prompt_ids[len(sample) :]
    completion = turn.completion
    return replace(
        sample,
        token_ids=sample.token_ids + given + completion.token_ids,
        loss_weights=sample.loss_weights + [0.0] * len(given) + [1.0] * len(completion.token_ids),
        logprobs=sample.logprobs + [0.0] * len(given) + completion.logprobs,
        policy_versions=sample.policy_versions + [-1] * len(given) + completion.policy_versions,
        turn_ids=sample.turn_ids + [-1] * len(given) + [number] * len(completion.token_ids),
        kept_ids=join_kept_ids(
            (sample.kept_ids, len(sample)), ([], len(given)), (completion.kept_ids, len(completion.token_ids))
        ),
        routed_experts=join_routed_experts(
            sample.routed_experts, completion.routed_experts, len(turn.prompt_ids) + len(completion.token_ids)
        ),
    )
