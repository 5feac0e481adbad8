"""What goes to and fro over the socket of a child process: pickled messages one way, answers the other; and both ends of it.

Both ends pickle, since both run the same code of the same user.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from sluice.errors import SluiceError
from sluice.processes import Child, Died

TICKS = 10
"""In which the limit of a sign of life is counted."""


@dataclass(frozen=True)
class Ping:
    """Asks for a sign of life."""


@dataclass(frozen=True)
class Alive:
    """It is."""

    is_busy: bool
    num_done: int
    """Grows with everything that it gets done."""


@dataclass(frozen=True)
class Answer:
    """To a request, by its number, which may get several; to everything else, in the order in which it was asked, without one."""

    number: int | None
    value: Any = None
    error: SluiceError | None = None


def failed(number: int | None, error: SluiceError) -> Answer:
    """Without the error's cause, which need not pickle."""
    return Answer(number, error=type(error)(str(error)))


async def read(reader: asyncio.StreamReader) -> Any:
    """The next message. Raises EOFError when there is none."""
    try:
        size = int.from_bytes(await reader.readexactly(8))
        return pickle.loads(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, OSError):  # OSError: a machine that was lost too
        raise EOFError from None


def write(writer: asyncio.StreamWriter, message: Any) -> None:
    body = pickle.dumps(message)
    writer.write(len(body).to_bytes(8) + body)


class Server(Protocol):
    """What a process does with the messages that come."""

    async def take(self, message: Any) -> None: ...


class Finished(BaseException):
    """By `Server.take`: the process is to end, and to tidy up before."""


def serve(pipe: socket.socket, server_of: Callable[[asyncio.StreamWriter, asyncio.TaskGroup], Server]) -> NoReturn:
    """In the process itself: hand each message to the server, until the parent is gone. What goes wrong unforeseen, in any task of the
    group too, ends the process, and the parent starts another."""
    with asyncio.Runner() as runner:  # at whose end all tasks are cancelled
        try:
            runner.run(_serve(pipe, server_of))
        except BaseException as error:
            if not (isinstance(error, BaseExceptionGroup) and error.subgroup(Finished)):
                leave(error)
    sys.exit()


def leave(error: BaseException) -> NoReturn:
    """At once: while a group of tasks is cancelled, what is not to blame would say that it has failed."""
    traceback.print_exception(error)
    os._exit(1)


async def _serve(pipe: socket.socket, server_of: Callable[[asyncio.StreamWriter, asyncio.TaskGroup], Server]) -> None:
    reader, writer = await asyncio.open_connection(sock=pipe)
    async with asyncio.TaskGroup() as tasks:
        server = server_of(writer, tasks)
        while True:
            try:
                message = await read(reader)
            except EOFError:  # the parent closed its end, or died
                os.killpg(0, signal.SIGKILL)
            try:
                await server.take(message)
            except Exception as error:
                leave(error)


class Connection:
    """One process from its start to its end, and what it was asked besides completions."""

    def __init__(
        self,
        process: Child,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        take: Callable[[int, Answer], None],
        ended: Callable[[Connection, str], None],
    ) -> None:
        """`take` gets the answers to requests by their numbers, `ended` is told once, with the cause."""
        self.process = process
        self.version = -1
        """Of the weights that it has."""
        self.number = 0
        """Which of its engine's processes it is."""
        self._writer, self._take, self._tell_end = writer, take, ended
        self._asked: deque[asyncio.Future[Any]] = deque()
        self._is_over = False
        self._sign: Alive | None = None
        """Its answer to the last `Ping`."""
        self._tasks = [asyncio.create_task(self._listen(reader))]

    def send(self, message: Any) -> None:
        if not self._is_over:
            write(self._writer, message)

    async def ask(self, message: Any, limit_s: float, setting: str = "") -> Any:
        """Raises Died when it ends before it answers, and ends it when it does not answer in time, which is the `setting`'s."""
        if self._is_over:
            raise Died("the process has ended")
        answer = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        self.send(message)
        try:
            async with asyncio.timeout(limit_s):
                return await answer
        except TimeoutError:
            limit = f"{limit_s:g} s ({setting})" if setting else f"{limit_s:g} s"
            what = f"it gave no answer to {type(message).__name__} within {limit} and was killed"
            self.end(what)
            raise Died(what) from None

    def watch(self, limit_s: float) -> None:
        """From now on, end it when it gives no sign of life for so long, or has work for so long and gets none of it done."""
        self._tasks.append(asyncio.create_task(self._watch(limit_s)))

    async def _watch(self, limit_s: float) -> None:
        """By ticks of its own and not by the clock: while a step of the trainer holds up this event loop, answers lie unread."""
        silent = stuck = 0
        before = None
        while max(silent, stuck) < TICKS:
            self._sign = None
            self.send(Ping())
            await asyncio.sleep(limit_s / TICKS)
            sign = self._sign
            silent = 0 if sign else silent + 1
            if sign:
                stuck = stuck + 1 if sign.is_busy and sign == before else 0
                before = sign
        what = "gave no sign of life" if silent else "got nothing of its work done"
        self.end(f"it {what} for {limit_s:g} s (engine.hang_timeout_s) and was killed")

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            cause = await self._heard(reader)
        except Exception as error:
            # a mistake of ours, or a machine that has no more threads: nobody would hear it any more
            traceback.print_exc()
            cause = f"what it said could not be heard ({type(error).__name__}: {error})"
        self.end(cause)

    async def _heard(self, reader: asyncio.StreamReader) -> str:
        """All that it says, until it ends; gives the cause of that."""
        with suppress(EOFError, pickle.UnpicklingError):
            while True:
                self._hear(await read(reader))
        self._writer.transport.abort()  # before its socket is closed
        cause, _ = await asyncio.to_thread(self.process.cause_of_death)
        return cause

    def _hear(self, answer: Answer | Alive) -> None:
        if isinstance(answer, Alive):
            self._sign = answer
        elif answer.number is not None:
            self._take(answer.number, answer)
        elif not (asked := self._asked.popleft()).done():
            asked.set_exception(answer.error) if answer.error else asked.set_result(answer.value)

    def end(self, cause: str) -> None:
        """Kill it, if it has not ended; fail all that it was asked."""
        if self._is_over:
            return
        self._is_over = True
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        self._writer.transport.abort()
        self.process.kill()
        for answer in self._asked:
            if not answer.done():
                answer.set_exception(Died(cause))
        self._tell_end(self, cause)
