"""How what a server makes of one completion, in several requests, becomes one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sluice.engines.dialect import Reply
from sluice.types import Completion, FinishReason, Sampling, join_routed_experts

Decode = Callable[[Sequence[int]], str]


def extend(done: Completion, reply: Reply, version: int, sampling: Sampling, decode: Decode) -> None:
    """By what the server gave for the rest; `version` is that of its weights, where it does not say so itself."""
    joint, count = len(done.token_ids), len(reply.token_ids)
    end = joint + count
    done.token_ids += reply.token_ids
    done.logprobs += reply.logprobs
    done.policy_versions += reply.policy_versions or [version] * count
    done.kept_ids += reply.kept_ids or [[]] * count
    done.routed_experts = join_routed_experts(
        done.routed_experts, reply.routed_experts, len(done.routed_experts) + count
    )
    done.finish_reason = reply.finish_reason
    if sampling.stop:
        end = _stopped_at(done.token_ids, sampling, joint, reply.finish_reason, decode)
    if end < joint + count or (reply.finish_reason == "abort" and end == sampling.max_new_tokens):
        done.finish_reason = "stop" if end < joint + count else "length"
    for column in (done.token_ids, done.logprobs, done.policy_versions, done.kept_ids):
        del column[end:]
    del done.routed_experts[len(done.routed_experts) - (joint + count - end) :]


def _stopped_at(token_ids: list[int], sampling: Sampling, joint: int, reason: FinishReason, decode: Decode) -> int:
    """How many tokens complete the first stop string that ends behind the joint, or all of them.

    A server does not see one that began before the tokens it was asked for, and where it draws several tokens at once it may
    give some behind the end.
    """
    reach = max(len(text.encode()) for text in sampling.stop) + 4  # tokens that may hold one: see EmbeddedEngine
    first = joint if joint else max(0, len(token_ids) - 2 * reach if reason == "stop" else len(token_ids))
    for end in range(first + 1, len(token_ids) + 1):
        text = decode(token_ids[max(0, end - reach) : end])
        if any(stop in text for stop in sampling.stop):
            return end
    return len(token_ids)
