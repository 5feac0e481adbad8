"""What the engine was asked for groups that are not handed in, and what it has made of it: so that a checkpoint holds half a completion.

A run that goes on answers a call that was finished from here, and has the engine go on with one that was not. So it is with an attempt
that is played again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from sluice.types import Completion, Sampling, join_kept_ids, join_routed_experts


@dataclass
class Call:
    ticket: int
    prompt_ids: list[int]
    made: Completion | None = None
    """So far."""
    is_finished: bool = False
    begun: Completion | None = None
    """What `made` began with before the engine was asked: in an earlier process, or by an attempt that is played again."""


class Calls:
    """By the seed of their sampling, which no two calls of a run share."""

    def __init__(self, saved: Mapping[int, Call] | None = None) -> None:
        """`saved` are those of a checkpoint."""
        self._saved = dict(saved or {})
        """Not made again yet."""
        self._open: dict[int, Call] = {}
        self._seeds: dict[int, list[int]] = {}
        """Of the open ones, by ticket: thousands are open at once."""

    def begin(self, ticket: int, prompt_ids: list[int], sampling: Sampling) -> tuple[Completion | None, bool]:
        """What there is of it already, and whether that is all. An environment that says something else than before the checkpoint, or
        than when it was played before, begins from nothing."""
        saved = self._saved.pop(sampling.seed, None) or self._open.get(sampling.seed)
        made, is_finished = None, False
        if saved and saved.made and saved.prompt_ids == prompt_ids:
            made, is_finished = saved.made, saved.is_finished
            if not is_finished:
                made = _resumable(made, sampling)
        self._seeds.setdefault(ticket, []).append(sampling.seed)
        self._open[sampling.seed] = Call(ticket, prompt_ids, made, is_finished, begun=made)
        return made and _copied(made), is_finished

    def finish(self, seed: int, completion: Completion) -> None:
        call = self._open.get(seed)
        if call:  # else its group is done without it
            call.made, call.is_finished = _copied(completion), True

    def note(self, unfinished: Mapping[int, Completion]) -> None:
        """What the engine has of those that it was asked for."""
        for seed, completion in unfinished.items():
            call = self._open.get(seed)
            if call and not call.is_finished:
                call.made = joined(call.begun, completion)

    def forget(self, ticket: int) -> None:
        """Its group is handed in."""
        for seed in self._seeds.pop(ticket, []):
            self._open.pop(seed, None)
        for seed in [seed for seed, call in self._saved.items() if call.ticket == ticket]:
            del self._saved[seed]

    def state(self, tickets: Collection[int]) -> dict[int, Call]:
        """Of these tickets, the calls of which there is something."""
        calls = {**self._saved, **self._open}
        return {seed: replace(call, begun=None) for seed, call in calls.items() if call.made and call.ticket in tickets}


def joined(begun: Completion | None, rest: Completion) -> Completion:
    """One completion of the two, which ends as the second one."""
    if begun is None:
        return rest
    return replace(
        rest,
        token_ids=begun.token_ids + rest.token_ids,
        logprobs=begun.logprobs + rest.logprobs,
        policy_versions=begun.policy_versions + rest.policy_versions,
        kept_ids=join_kept_ids((begun.kept_ids, len(begun.token_ids)), (rest.kept_ids, len(rest.token_ids))),
        routed_experts=join_routed_experts(
            begun.routed_experts, rest.routed_experts, len(begun.routed_experts) + len(rest.token_ids)
        ),
    )


def rest_of(sampling: Sampling, begun: Completion) -> Sampling:
    """To go on after these tokens, with the draws that come next."""
    num = len(begun.token_ids)
    return replace(sampling, max_new_tokens=sampling.max_new_tokens - num, num_drawn=num)


def _resumable(made: Completion, sampling: Sampling) -> Completion | None:
    """Without its last tokens where a text to stop at may have begun in them, which is searched in what is made anew."""
    room = max((len(text.encode()) + 4 for text in sampling.stop), default=0)
    num = min(len(made.token_ids) - room, sampling.max_new_tokens - 1)
    return _copied(made, num) if num > 0 else None


def _copied(completion: Completion, num: int | None = None) -> Completion:
    """With lists of its own, of the first `num` tokens: an environment may edit what it is given."""
    dropped = 0 if num is None else max(0, len(completion.token_ids) - num)
    return replace(
        completion,
        token_ids=completion.token_ids[:num],
        logprobs=completion.logprobs[:num],
        policy_versions=completion.policy_versions[:num],
        kept_ids=completion.kept_ids[:num],
        routed_experts=completion.routed_experts[: len(completion.routed_experts) - dropped],
    )
