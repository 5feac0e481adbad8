"""One question, one answer."""

from __future__ import annotations

from sluice.interfaces import Policy
from sluice.types import Prompt, Trajectory


async def single_turn(prompt: Prompt, policy: Policy) -> Trajectory:
    await policy.respond(prompt.messages)
    return Trajectory(policy.turns, stop_reason=policy.turns[-1].completion.finish_reason)
