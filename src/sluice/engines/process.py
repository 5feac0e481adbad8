"""An embedded engine in a process of its own, with its own copy of the weights: it goes on generating while the trainer trains.

One that dies is started again with the weights that were published last, and told again what it had not answered; since what a
request draws depends on its seed only, no sample is lost.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from sluice.engines.embedded import EmbeddedEngine, settled
from sluice.engines.serving import Answer, Begin, Cancel, Fingerprint, Generate, Load, Update, read, write
from sluice.errors import EngineError, SluiceError, boundary
from sluice.interfaces import LanguageModel, Weights
from sluice.processes import Process
from sluice.types import Completion, Sampling
from sluice.weights.shared_memory import SharedWeights

START_LIMIT_S = 300.0
"""For its imports, and for making the model."""
PUBLISH_LIMIT_S = 300.0
"""For taking over weights, and for their fingerprint."""

T = TypeVar("T")


class _Died(EngineError):
    """The process did, before it answered."""


@dataclass(frozen=True)
class _Request:
    prompt_ids: list[int]
    sampling: Sampling
    answer: asyncio.Future[Completion]


class EngineProcess:
    def __init__(
        self,
        model: LanguageModel,
        engine: Callable[[Load], EmbeddedEngine],
        *,
        synchronous: bool,
        finish_limit_s: float | None,
        max_restarts: int,
    ) -> None:
        """`engine` makes the engine in the other process, where it must be importable; its model has the weights of `model`, by name
        and shape, and `Load` puts the numbers into them.

        `synchronous`: nothing is asked while weights change, and requests that are asked for together are begun together.
        `finish_limit_s`: completions that were begun end with the weights that they began with, for which a publication waits so
        long at most; None: they go on with the new ones.
        """
        self.model = model
        self.version = 0
        self.log: Path | None = None
        """File for what the process prints; it is told before there is one."""
        self.tell: Callable[[str, str], None] = lambda kind, text: None
        """Takes kind and text of an event."""
        self._engine = engine
        self._synchronous = synchronous
        self._finish_limit_s = finish_limit_s
        self._max_restarts = self._restarts_left = max_restarts
        self._path, self._folder = list(sys.path), os.getcwd()  # a replacement finds what the first one found
        self._shared = SharedWeights(model.named_weights())
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        self._numbers = count()
        self._requests: dict[int, _Request] = {}
        """All that are not answered, in the order in which they came."""
        self._unsent: set[int] = set()
        self._posting: asyncio.Task[None] | None = None
        self._closed = False

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """As the embedded engine does. Raises EngineError too when the process has died more often than it may."""
        if self._closed:
            raise EngineError("the engine is closed")
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._requests[number] = _Request(list(prompt_ids), sampling, answer)
        self._post_soon({number})
        try:
            return await answer
        finally:
            del self._requests[number]
            if answer.cancelled() and self._connection:
                self._connection.send(Cancel(number))

    async def update_weights(self, weights: Weights, version: int) -> None:
        """Raises EngineError for another model's weights, and when the process has died more often than it may."""
        if weights.model is not self.model:
            raise EngineError("the engine's process was made for another model than the one whose weights it is given")
        async with self._connecting:  # one that begins reads them
            self._shared.write(self.model.named_weights())
            self.version = version
        await self._persistently(self._publish)

    async def _publish(self, connection: _Connection) -> None:
        if connection.version != self.version:
            update = Update(self.version, finish=self._finish_limit_s is not None)
            await connection.ask(update, PUBLISH_LIMIT_S + (self._finish_limit_s or 0.0))
            connection.version = self.version

    async def fingerprint(self) -> str | None:
        return await self._persistently(lambda connection: connection.ask(Fingerprint(), PUBLISH_LIMIT_S))

    async def close(self) -> None:
        self._closed = True
        if self._posting:
            self._posting.cancel()
        if self._connection:
            self._connection.end("the engine was closed")
        self._refuse("the engine was closed")
        self._shared.close()

    def status(self) -> str:
        """What it does at the moment, for people."""
        connection = self._connection
        if connection is None:
            where = "a process that is starting" if self._connecting.locked() else "no process"
        else:
            where = f"process {connection.process.pid}"
        return f"{where}: {len(self._requests)} completions are asked for; weights of version {self.version}"

    # -- the process --

    async def _persistently(self, ask: Callable[[_Connection], Awaitable[T]]) -> T:
        """Of the next process too when one dies."""
        for _ in range(self._restarts_left + 1):
            with suppress(_Died):
                return await ask(await self._connected())
        raise self._died_too_often()

    async def _connected(self) -> _Connection:
        """Starts one if there is none. Raises EngineError when that cannot be done, or was done too often."""
        async with self._connecting:
            if self._connection:
                return self._connection
            if self._closed:
                raise EngineError("the engine is closed")
            if self._restarts_left < 0:
                raise self._died_too_often()
            with boundary(EngineError, "the engine's process could not be started"):
                process = Process(
                    "sluice.engines.serving",
                    path=self._path,
                    folder=self._folder,
                    log=self.log,
                    variables={},
                    pass_fds=[self._shared.fd],
                )
            try:
                reader, writer = await asyncio.open_connection(sock=process.socket)
            except BaseException:
                process.kill()
                raise
            connection = _Connection(process, reader, writer, self._take, self._ended)
            try:
                await connection.ask(Begin(self._engine, self._shared.fd, self.version), START_LIMIT_S)
            except BaseException as error:
                connection.end(f"it did not start: {error}")
                if isinstance(error, SluiceError) and not isinstance(error, _Died):
                    raise EngineError(f"the engine's process could not be started: {error}{self._see}") from error
                raise
            connection.version = self.version
            self._connection = connection
            return connection

    def _ended(self, connection: _Connection, cause: str) -> None:
        """What it had not answered is asked again."""
        if self._connection is connection:
            self._connection = None
        if self._closed:
            return
        self._restarts_left -= 1
        left = (
            "it is not started again"
            if self._restarts_left < 0
            else f"it is started again, {self._restarts_left} more left"
        )
        self.tell(
            "engine_died",
            f"the engine: {cause}{self._see}; {len(self._requests)} completions were asked for; {left} (engine.max_restarts)",
        )
        if self._restarts_left < 0:
            self._refuse(str(self._died_too_often()))
        elif self._requests:
            self._post_soon(set(self._requests))

    def _died_too_often(self) -> EngineError:
        times = "once" if self._max_restarts == 0 else f"{self._max_restarts + 1} times"
        return EngineError(f"the engine's process died {times} (limit: engine.max_restarts){self._see}")

    @property
    def _see(self) -> str:
        return f"; see {self.log}" if self.log else ""

    # -- requests --

    def _post_soon(self, numbers: set[int]) -> None:
        self._unsent |= numbers
        if self._posting is None:
            self._posting = asyncio.create_task(self._post())

    async def _post(self) -> None:
        try:
            if self._synchronous:
                await settled(self._unsent)
            connection = await self._connected()
            numbers = sorted(self._unsent & self._requests.keys())
            self._unsent.clear()
            requests = [
                (number, self._requests[number].prompt_ids, self._requests[number].sampling) for number in numbers
            ]
            connection.send(Generate(requests))
        except _Died:
            pass  # `_ended` has seen to it
        except SluiceError as error:
            self._refuse(str(error))
        finally:
            self._posting = None
            if self._unsent and not self._closed and self._restarts_left >= 0:
                self._post_soon(set())

    def _take(self, number: int, answer: Answer) -> None:
        request = self._requests.get(number)
        if request is None or request.answer.done():
            return
        if answer.error:
            request.answer.set_exception(answer.error)
        else:
            assert isinstance(answer.value, Completion)
            request.answer.set_result(answer.value)

    def _refuse(self, what: str) -> None:
        self._unsent.clear()
        for request in self._requests.values():
            if not request.answer.done():
                request.answer.set_exception(EngineError(what))


class _Connection:
    """One process from its start to its end, and what it was asked besides completions."""

    def __init__(
        self,
        process: Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        take: Callable[[int, Answer], None],
        ended: Callable[[_Connection, str], None],
    ) -> None:
        """`take` gets the answers to requests by their numbers, `ended` is told once, with the cause."""
        self.process = process
        self.version = -1
        """Of the weights that it has."""
        self._writer, self._take, self._tell_end = writer, take, ended
        self._asked: deque[asyncio.Future[Any]] = deque()
        self._is_over = False
        self._listener = asyncio.create_task(self._listen(reader))

    def send(self, message: Any) -> None:
        if not self._is_over:
            write(self._writer, message)

    async def ask(self, message: Any, limit_s: float) -> Any:
        """Raises _Died when it ends before it answers, and ends it when it does not answer in time."""
        if self._is_over:
            raise _Died("the engine's process has ended")
        answer = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        self.send(message)
        try:
            async with asyncio.timeout(limit_s):
                return await answer
        except TimeoutError:
            what = f"it gave no answer to {type(message).__name__} within {limit_s:g} s and was killed"
            self.end(what)
            raise _Died(what) from None

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with suppress(EOFError, pickle.UnpicklingError):
            while True:
                answer: Answer = await read(reader)
                if answer.number is not None:
                    self._take(answer.number, answer)
                elif not (asked := self._asked.popleft()).done():
                    asked.set_exception(answer.error) if answer.error else asked.set_result(answer.value)
        self._writer.transport.abort()  # before its socket is closed
        cause, _ = await asyncio.to_thread(self.process.cause_of_death)
        self.end(cause)

    def end(self, cause: str) -> None:
        """Kill it, if it has not ended; fail all that it was asked."""
        if self._is_over:
            return
        self._is_over = True
        if self._listener is not asyncio.current_task():
            self._listener.cancel()
        self._writer.transport.abort()
        self.process.kill()
        for answer in self._asked:
            if not answer.done():
                answer.set_exception(_Died(cause))
        self._tell_end(self, cause)
