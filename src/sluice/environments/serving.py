"""What runs inside an environment's process: attempts, many side by side, whose policy is at the other end of a socket.

The parent's side is `sluice.environments.processes`.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import pickle
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NoReturn

from sluice import connection
from sluice.connection import Answer, failed, write
from sluice.environments.playing import play
from sluice.errors import (
    ConfigError,
    DataError,
    EngineError,
    EngineGoneError,
    EnvironmentError_,
    PromptTooLongError,
    SluiceError,
)
from sluice.hooks import resolve
from sluice.interfaces import Environment
from sluice.processes import Parent, belong_to
from sluice.threads import DaemonThreads
from sluice.types import Message, Prompt, Turn

BLOCKED_S = 10.0
"""After which an event loop that does not run is told in the log, with the lines that all threads are at."""
TOLD_APART = PromptTooLongError, EngineGoneError, EngineError, DataError, ConfigError, EnvironmentError_
"""Kinds of errors, by whoever plays an attempt: those that are of another kind too before that one."""


@dataclass(frozen=True)
class Begin:
    """The first message."""

    environment: str
    """`module:function`"""


@dataclass(frozen=True)
class Play:
    number: int
    """Of the attempt; what is said of it is an answer by this number."""
    prompt: Prompt


@dataclass(frozen=True)
class Cancel:
    number: int


@dataclass(frozen=True)
class Finish:
    """The last message: the process is to end as Python does, with what is registered with `atexit`."""


@dataclass(frozen=True)
class Reply:
    """Of the policy."""

    number: int
    call: int
    answer: tuple[Turn, Message] | None
    error: Exception | None = None


@dataclass(frozen=True)
class Ask:
    """Of the policy, in an attempt."""

    call: int
    messages: bytes
    """Pickled apart, as all that comes from the user's code: what cannot be read is then an error of this attempt."""


@dataclass(frozen=True)
class Drop:
    """The attempt does not wait for that call any more."""

    call: int


@dataclass(frozen=True)
class Ended:
    result: bytes
    """What the environment returned, the turns of its policy, and what it raised, as a pickled tuple."""


def sendable(error: Exception) -> Exception:
    """What it says, as an error that any process can read, of the nearest kind that is told apart."""
    for kind in TOLD_APART:
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")


def serve(fd: int, parent: Parent) -> NoReturn:
    faulthandler.enable()  # a crash in C code says in the log where it was
    connection.serve(belong_to(parent, fd), _Server)


class _Server:
    def __init__(self, writer: asyncio.StreamWriter, tasks: asyncio.TaskGroup) -> None:
        self._writer, self._tasks = writer, tasks
        self._environment: Environment
        self._attempts: dict[int, tuple[asyncio.Task[bytes], _Policy]] = {}
        asyncio.get_running_loop().set_default_executor(DaemonThreads())

    async def take(self, message: Any) -> None:
        match message:
            case Begin(environment):
                self._begin(environment)
            case Play(number, prompt):
                policy = _Policy(number, self._writer)
                task = self._tasks.create_task(self._play(prompt, policy))
                self._attempts[number] = task, policy
                task.add_done_callback(lambda task: self._end(number, task))
            case Reply(number):
                if number in self._attempts:  # else it has ended without it
                    self._attempts[number][1].take(message)
            case Cancel(number):
                if number in self._attempts:  # else it ended a moment ago
                    self._attempts[number][0].cancel()
            case Finish():
                # open until the process has ended: before that, the parent is not to take it for dead
                os.dup(self._writer.get_extra_info("socket").fileno())
                raise connection.Finished
            case _:
                raise TypeError(f"a message that nobody sends: {message!r}")

    def _begin(self, environment: str) -> None:
        try:
            self._environment = resolve(environment, ("prompt", "policy"), awaited=True)
        except SluiceError as error:
            traceback.print_exc()
            write(self._writer, failed(None, error))
        else:
            self._tasks.create_task(_tell_when_blocked())
            write(self._writer, Answer(None))

    async def _play(self, prompt: Prompt, policy: _Policy) -> bytes:
        result = error = None
        try:
            result = await play(self._environment, prompt, policy)
        except SluiceError as raised:
            error = sendable(raised)
        return _pickled(result, policy.turns, error)

    def _end(self, number: int, task: asyncio.Task[bytes]) -> None:
        """Not by the task itself: one that is cancelled may not have begun."""
        _, policy = self._attempts.pop(number)
        policy.end()
        if task.cancelled():
            result = _pickled(None, policy.turns, RuntimeError("it was cancelled"))
        elif error := task.exception():
            connection.leave(error)
        else:
            result = task.result()
        write(self._writer, Answer(number, Ended(result)))


class _Policy:
    """The policy of one attempt, as its environment sees it."""

    def __init__(self, number: int, writer: asyncio.StreamWriter) -> None:
        self.turns: list[Turn] = []
        self._number, self._writer = number, writer
        self._calls = count()
        self._replies: dict[int, asyncio.Future[Message]] = {}
        self._is_over = False

    async def respond(self, messages: Sequence[Message]) -> Message:
        """As the run's own."""
        if self._is_over:
            raise RuntimeError("the attempt has ended")
        call, reply = next(self._calls), asyncio.get_running_loop().create_future()
        try:
            asked = pickle.dumps(list(messages))
        except Exception as error:
            what = "what is said to the policy cannot be sent to the process of the run (rollout.environment_workers)"
            raise TypeError(f"{what}: {type(error).__name__}: {error}") from error
        self._say(Ask(call, asked))
        self._replies[call] = reply
        try:
            return await reply
        finally:
            del self._replies[call]
            if reply.cancelled():
                self._say(Drop(call))

    def take(self, reply: Reply) -> None:
        waiting = self._replies.get(reply.call)
        if waiting is None or waiting.done():
            return
        if reply.answer is None:
            assert reply.error is not None
            waiting.set_exception(reply.error)
        else:
            turn, message = reply.answer
            try:
                self.turns.append(turn)
            except Exception as error:  # the environment has put something else in their place
                waiting.set_exception(error)
            else:
                waiting.set_result(message)

    def end(self) -> None:
        """Whatever the attempt has left behind gets no more answers."""
        self._is_over = True
        for reply in self._replies.values():
            reply.cancel()

    def _say(self, message: Ask | Drop) -> None:
        write(self._writer, Answer(self._number, message))


def _pickled(result: Any, turns: list[Turn], error: Exception | None) -> bytes:
    try:
        return pickle.dumps((result, turns, error))
    except Exception as cause:
        what = f"what it returned cannot be sent to the process of the run: {type(cause).__name__}: {cause}"
        return pickle.dumps((None, None, error or RuntimeError(what)))


async def _tell_when_blocked() -> None:
    """By a thread in C, which needs nothing of Python: whatever holds up this loop may hold the interpreter too."""
    while True:
        faulthandler.dump_traceback_later(BLOCKED_S)
        await asyncio.sleep(BLOCKED_S / 4)
