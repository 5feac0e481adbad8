"""Environments as users write them: good, wrong, and hostile."""

import asyncio
import atexit
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from sluice.types import Trajectory


async def three_turns(prompt, policy):
    messages = [*prompt.messages]
    for turn in range(3):
        messages += [await policy.respond(messages), {"role": "user", "content": f"go on after {turn}"}]
        policy.turns[-1].reward = len(policy.turns[-1].completion.text) / 8
    return Trajectory(policy.turns, f"{len(messages)} messages")


async def slow_turns(prompt, policy):
    await asyncio.sleep(0.05)
    trajectory = await three_turns(prompt, policy)
    await asyncio.sleep(0.15)
    return trajectory


async def side_by_side(prompt, policy):
    await asyncio.gather(*(policy.respond([*prompt.messages, *prompt.messages[:n]]) for n in range(2)))
    return Trajectory(policy.turns)


async def raising(prompt, policy):
    await policy.respond(prompt.messages)
    policy.turns[-1].reward = 0.5
    raise ValueError("bad state\nof two lines")


async def raising_at_once(prompt, policy):
    raise KeyError(prompt.id)


async def exiting(prompt, policy):
    await policy.respond(prompt.messages)
    sys.exit(0)


async def cancelling(prompt, policy):
    """Waits for something that was cancelled, not for the end of the run."""
    helper = asyncio.create_task(asyncio.sleep(60))
    asyncio.get_running_loop().call_soon(helper.cancel)
    await helper


async def reporting(prompt, policy):
    await policy.respond(prompt.messages)
    return Trajectory(policy.turns, outcome="error", error="no such room")


async def returning_text(prompt, policy):
    return (await policy.respond(prompt.messages))["content"]


async def returning_a_function(prompt, policy):
    await policy.respond(prompt.messages)
    return Trajectory(policy.turns, stop_reason=lambda: "never")  # type: ignore[arg-type]


async def without_a_turn(prompt, policy):
    return Trajectory([])


async def editing(prompt, policy):
    await policy.respond(prompt.messages)
    policy.turns[-1].completion.logprobs = []
    return Trajectory(policy.turns)


async def talking_on(prompt, policy):
    await policy.respond(prompt.messages)
    await policy.respond([{"role": "user", "content": "more " * 60}])


async def too_long_at_once(prompt, policy):
    await policy.respond([{"role": "user", "content": "more " * 60}])


async def saying_nonsense(prompt, policy):
    await policy.respond(prompt.messages)
    await policy.respond([{"role": "user", "content": object}])


async def heeding_errors(prompt, policy):
    try:
        await policy.respond(prompt.messages)
    except Exception as error:
        raise LookupError(f"in the policy, {type(error).__name__}") from error


async def impatient(prompt, policy):
    try:
        async with asyncio.timeout(0.05):
            await policy.respond(prompt.messages)
    except TimeoutError:
        await policy.respond([{"role": "user", "content": "then this"}])
    return Trajectory(policy.turns)


def is_first(name: str) -> bool:
    """Of all attempts, in whichever process."""
    try:
        Path(name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


async def waiting(prompt, policy):
    """Says that it was cancelled, if it is."""
    try:
        is_first(f"{prompt.messages[0]['content']}-begun")
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        is_first(f"{prompt.messages[0]['content']}-cancelled")
        raise


async def deadly(prompt, policy):
    """For one prompt, whichever process plays it."""
    await policy.respond(prompt.messages)
    await asyncio.sleep(0.05)
    if prompt.id == "q11":
        os.kill(os.getpid(), signal.SIGSEGV)
    return Trajectory(policy.turns)


async def blocking_once(prompt, policy):
    await policy.respond(prompt.messages)
    await asyncio.sleep(0.05)
    if is_first("blocked"):
        time.sleep(60)  # noqa: ASYNC251  # the mistake
    return Trajectory(policy.turns)


async def deaf(prompt, policy):
    """Catches its own cancellation and goes on, in the first of all attempts."""
    await policy.respond(prompt.messages)
    is_deaf = is_first("deaf")
    while is_deaf:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            print("heard, but not heeded")
    return Trajectory(policy.turns)


async def printing(prompt, policy):
    await policy.respond(prompt.messages)
    print("played", prompt.id)
    return Trajectory(policy.turns)


class Panic(BaseException):
    """As those of Rust are, and what `pytest.fail` raises."""


async def panicking(prompt, policy):
    await policy.respond(prompt.messages)
    raise Panic("no such state")


async def without_a_list(prompt, policy):
    policy.turns = ()
    await policy.respond(prompt.messages)


async def with_no_list_at_last(prompt, policy):
    await policy.respond(prompt.messages)
    policy.turns = 5
    raise ValueError("bad state")


async def ending_all(prompt, policy):
    """For one prompt; others do not end at once when they are cancelled."""
    await policy.respond(prompt.messages)
    try:
        await asyncio.sleep(0.1)
        if prompt.id == "q11":
            raise KeyboardInterrupt
    except asyncio.CancelledError:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        raise
    return Trajectory(policy.turns)


async def ending_all_from_a_task(prompt, policy):
    """For one prompt: what it began is no attempt's."""

    async def end():
        sys.exit(3)

    await policy.respond(prompt.messages)
    if prompt.id == "q11":
        _ending.add(asyncio.create_task(end()))
    await asyncio.sleep(0.1)
    return Trajectory(policy.turns)


_ending = set()


class Unreadable:
    """Where it was not made."""

    def __init__(self, process):
        if process != os.getpid():
            raise ValueError("not twice")
        self._process = process

    def __reduce__(self):
        return Unreadable, (self._process,)


async def returning_what_cannot_be_read(prompt, policy):
    await policy.respond(prompt.messages)
    return Unreadable(os.getpid())


async def tidy(prompt, policy):
    await policy.respond(prompt.messages)
    atexit.register(Path("tidied up").touch)
    return Trajectory(policy.turns)
