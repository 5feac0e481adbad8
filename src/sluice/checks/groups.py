"""What must hold of the groups of a step, and of the samples made from them. Each check says what is wrong, or ""."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from sluice.checks.columns import column, first, place
from sluice.types import Group, Sample, Trajectory


def staleness(groups: Sequence[Group], version: int, max_staleness: int) -> str:
    """`version` is that of the weights that are about to be trained."""
    for group in groups:
        age = 0 if group.rejected else version - group.oldest_version
        if age > max_staleness:
            return (
                f"group {group.id} (prompt {group.prompt.id}) was sampled {age} versions ago, and rollout.max_staleness is "
                f"{max_staleness}"
            )
    return ""


def trained_once(groups: Sequence[Group], last_ticket: int) -> str:
    """Of the tickets after `last_ticket`, the last one trained before: each comes once, in order, to be trained or rejected."""
    trained = [group for group in groups if not group.rejected]
    for before, group in pairwise([last_ticket, *trained]):
        ticket = before if isinstance(before, int) else before.id
        if isinstance(group, Group) and group.id <= ticket:
            return (
                f"group {group.id} (prompt {group.prompt.id}) was taken after group {ticket}: it was trained before, or groups "
                "were not taken in the order of their tickets"
            )
    known = {group.id for group in groups}
    newest = trained[-1].id if trained else last_ticket
    for ticket in range(last_ticket + 1, newest):
        if ticket not in known:
            return (
                f"group {ticket} was neither trained nor rejected, and group {newest} after it is about to be trained"
            )
    return ""


def data_unchanged(prompts: Any) -> str:
    """`prompts.changed()` names the data file that has other content than when the run began."""
    file = prompts.changed()
    return file and f"{file} since the run began: rows that were checked may no longer be those that are read"


def outcome_budget(groups: Sequence[Group], max_error_share: float) -> str:
    """Over all attempts of the step, those of rejected groups too."""
    attempts = [trajectory for group in groups for trajectory in group.trajectories]
    failed = [trajectory for trajectory in attempts if trajectory.outcome in ("error", "timeout")]
    if len(failed) <= max_error_share * len(attempts):
        return ""
    timeouts = sum(trajectory.outcome == "timeout" for trajectory in failed)
    return (
        f"{len(failed)} of {len(attempts)} attempts have no score ({timeouts} of them ran out of time), and "
        f"checks.max_error_share is {max_error_share:g}; the last one: {failed[-1].error}"
    )


def groups_whole(groups: Sequence[Group], samples: Sequence[Sample], group_size: int) -> str:
    """Samples belong to a group that was taken and say of it what it says itself, and nothing of it is missing."""
    trained = {group.id: group for group in groups if not group.rejected}
    for group in trained.values():
        if len(group.trajectories) != group_size:
            return (
                f"group {group.id} (prompt {group.prompt.id}) has {len(group.trajectories)} attempts, not {group_size}"
            )
        for index, trajectory in enumerate(group.trajectories):
            if trajectory.outcome == "scored" and trajectory.error:
                return f"attempt {index} of group {group.id} is scored, and bears an error: {trajectory.error}"
    turns: dict[tuple[int, int], list[int]] = {
        (group.id, index): [number for number, turn in enumerate(trajectory.turns) if turn.completion.token_ids]
        for group in trained.values()
        for index, trajectory in enumerate(group.trajectories)
        if trajectory.outcome == "scored"
    }
    told: dict[tuple[int, int], list[int]] = {}
    for sample in samples:
        group = trained.get(sample.group)
        if group is None or (sample.group, sample.index) not in turns:
            return f"sample {sample.name} belongs to no scored attempt of a group that was taken"
        if sample.prompt_id != group.prompt.id:
            return f"sample {sample.name} is of prompt {sample.prompt_id}, and its group of prompt {group.prompt.id}"
        own = sorted({number for number in sample.turn_ids if number >= 0}) if sample.turn_ids else [0]
        if why := _unlike(sample, group.trajectories[sample.index], own):
            return f"sample {sample.name}: {why}"
        told.setdefault((sample.group, sample.index), []).extend(own)
    for (ticket, index), wanted in turns.items():
        if told.get((ticket, index)) != wanted:
            return f"attempt {index} of group {ticket} has turns {wanted}, and its samples have {told.get((ticket, index), [])}"
    return ""


def _unlike(sample: Sample, trajectory: Trajectory, numbers: Sequence[int]) -> str:
    """In what a sample differs from the turns that it was made from: lists are compared whole, at the speed of C."""
    if sample.reward != trajectory.reward:
        return f"its reward is {sample.reward}, and its attempt's {trajectory.reward}"
    if not numbers or numbers[-1] >= len(trajectory.turns):
        return f"it has turns {list(numbers)}, and its attempt {len(trajectory.turns)}"
    num_own = 0
    for number in numbers:
        turn = trajectory.turns[number]
        completion = turn.completion
        start, end = len(turn.prompt_ids), len(turn.prompt_ids) + len(completion.token_ids)
        num_own += end - start
        if sample.token_ids[:end] != turn.prompt_ids + completion.token_ids:
            return f"its tokens are not those that the engine saw and gave in turn {number}"
        if sample.logprobs[start:end] != completion.logprobs:
            return f"its log-probs are not those of the engine in turn {number}"
        if sample.policy_versions[start:end] != completion.policy_versions:
            return f"its policy versions are not those of turn {number}"
        if sample.temperature != completion.temperature:
            return f"its temperature is {sample.temperature}, and that of turn {number} {completion.temperature}"
    written = len(sample) - sample.policy_versions.count(-1)
    return "" if written == num_own else f"the policy wrote {num_own} of its tokens, and {written} are said to be its"


def loss_mask(samples: Sequence[Sample]) -> str:
    weights, written = column(samples, "loss_weights"), column(samples, "policy_versions", int) >= 0
    at = first((weights != 0) != written)
    if at is None:
        return ""
    who = "the policy wrote" if written[at] else "the policy did not write"
    return f"{place(samples, at)}: a loss weight of {weights[at]:g} where {who} it"
