"""How an attempt is played, in whichever process: what the user's code raises is an error of its sample, and says where."""

from __future__ import annotations

import asyncio
from typing import Any

from sluice.errors import EnvironmentError_, boundary
from sluice.hooks import raised_at
from sluice.interfaces import Environment, Policy
from sluice.types import Prompt


async def play(environment: Environment, prompt: Prompt, policy: Policy) -> Any:
    """What it returns, whatever that is. Raises EnvironmentError_ for what it raises, other than errors of sluice."""
    try:
        with boundary(EnvironmentError_, f"rollout.environment, on prompt {prompt.id}"):
            return await _kept_running(environment, prompt, policy)
    except EnvironmentError_ as error:
        if error.__cause__ is None:  # it says where already
            raise
        raise EnvironmentError_(f"{error}{raised_at(error.__cause__)}") from error.__cause__


async def _kept_running(environment: Environment, prompt: Prompt, policy: Policy) -> Any:
    try:
        return await environment(prompt, policy)
    except (Exception, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # SystemExit, a panic of Rust, what pytest.fail raises, a cancellation
        if isinstance(error, asyncio.CancelledError) and (task := asyncio.current_task()) and task.cancelling():
            raise
        # Not the end of the run but the environment's doing; as it is, it would end a worker or the process in silence.
        raise RuntimeError(repr(error)) from error
