"""An embedded engine in a process of its own, with its own copy of the weights: it goes on generating while the trainer trains.

One that dies is started again with the weights that were published last, and told again what it had not answered; since what a
request draws depends on its seed only, no sample is lost.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TypeVar

from sluice.connection import Answer, Connection, Died
from sluice.engines.embedded import EmbeddedEngine, settled
from sluice.engines.serving import Begin, Cancel, Fingerprint, Generate, Unfinished, Update
from sluice.errors import EngineError, SluiceError, boundary
from sluice.interfaces import Weights
from sluice.processes import Process
from sluice.types import Completion, Sampling
from sluice.weights.publication import Link, Publication, WeightsMoved

START_LIMIT_S = 300.0
"""For its imports, and for making the model."""
PUBLISH_LIMIT_S = 300.0
"""For taking over weights, and for their fingerprint."""
ASK_LIMIT_S = 60.0
"""For what it can say at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Request:
    prompt_ids: list[int]
    sampling: Sampling
    answer: asyncio.Future[Completion]


class EngineProcess:
    def __init__(
        self,
        publication: Publication,
        engine: Callable[[], EmbeddedEngine],
        *,
        synchronous: bool,
        finish_limit_s: float | None,
        max_restarts: int,
    ) -> None:
        """`publication` is how weights get to it. `engine` makes the engine in the other process, where it must be importable, with a
        model whose weights do not matter yet.

        `synchronous`: nothing is asked while weights change, and requests that are asked for together are begun together.
        `finish_limit_s`: completions that were begun end with the weights that they began with, for which a publication waits so
        long at most; None: they go on with the new ones.
        """
        self.version = -1
        """Of the weights that were published last."""
        self.log: Path | None = None
        self.tell: Callable[[str, str], None] = lambda kind, text: None
        self._engine = engine
        self._synchronous = synchronous
        self._finish_limit_s = finish_limit_s
        self._max_restarts = self._restarts_left = max_restarts
        self._path, self._folder = list(sys.path), os.getcwd()  # a replacement finds what the first one found
        self._publication = publication
        self._link: Link
        """With the process that is connected."""
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()
        self._asking = asyncio.Lock()
        """Answers come in the order of what was asked."""
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

    async def update_weights(self, weights: Weights, version: int) -> int:
        """Raises EngineError when the process has died more often than it may."""
        async with self._connecting:  # one that begins reads them
            num_bytes = await self._publication.publish(weights, version)
            self.version = version
        await self._persistently(self._deliver)
        self._post_soon(set())  # what waited for weights
        return num_bytes

    async def _deliver(self, connection: Connection) -> None:
        if connection.version == self.version:
            return
        link = self._link
        update = Update(self.version, finish=self._finish_limit_s is not None)
        limit_s = PUBLISH_LIMIT_S + (self._finish_limit_s or 0.0)
        async with self._asking:
            await link.deliver(update.version, lambda: connection.ask(update, limit_s))
        connection.version = update.version

    async def fingerprint(self) -> str | None:
        async def ask(connection: Connection) -> str | None:
            async with self._asking:
                return await connection.ask(Fingerprint(), PUBLISH_LIMIT_S)

        return await self._persistently(ask)

    async def unfinished(self) -> dict[int, Completion]:
        """As the embedded engine does; nothing while no process is connected."""
        connection = self._connection
        if connection is None or not self._requests:
            return {}
        with suppress(Died):
            async with self._asking:
                return await connection.ask(Unfinished(), ASK_LIMIT_S)
        return {}

    async def close(self) -> None:
        self._closed = True
        if self._posting:
            self._posting.cancel()
        if self._connection:
            self._connection.end("the engine was closed")
        self._refuse("the engine was closed")
        self._publication.close()

    def belongs_to(self, folder: Path, tell: Callable[[str, str], None]) -> None:
        """A run: what the process prints goes to a file in its folder, and events to `tell`, which takes kind and text."""
        self.log, self.tell = folder / "engine.log", tell
        self._publication.belongs_to(folder)

    def status(self) -> str:
        """What it does at the moment, for people."""
        connection = self._connection
        if connection is None:
            where = "a process that is starting" if self._connecting.locked() else "no process"
        else:
            where = f"process {connection.process.pid}"
        weights = f"weights of version {self.version}" if self.version >= 0 else "no weights yet"
        return f"{where}: {len(self._requests)} completions are asked for; {weights}"

    # -- the process --

    async def _persistently(self, ask: Callable[[Connection], Awaitable[T]]) -> T:
        """Of the next process too when one dies."""
        for _ in range(self._restarts_left + 1):
            with suppress(Died):
                return await ask(await self._connected())
        raise self._died_too_often()

    async def _connected(self) -> Connection:
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
                    pass_fds=self._publication.fds,
                )
            try:
                reader, writer = await asyncio.open_connection(sock=process.socket)
            except BaseException:
                process.kill()
                raise
            connection = Connection(process, reader, writer, self._take, self._ended)
            self._link = self._publication.link()
            try:
                await connection.ask(Begin(self._engine, self._link.inlet), START_LIMIT_S)
                with suppress(WeightsMoved):  # it gets the next ones
                    await self._deliver(connection)
            except BaseException as error:
                connection.end(f"it did not start: {error}")
                if isinstance(error, SluiceError) and not isinstance(error, Died):
                    raise EngineError(f"the engine's process could not be started: {error}{self._see}") from error
                raise
            self._connection = connection
            return connection

    def _ended(self, connection: Connection, cause: str) -> None:
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
        if self._unsent and self._posting is None:
            self._posting = asyncio.create_task(self._post())

    async def _post(self) -> None:
        try:
            if self._synchronous:
                await settled(self._unsent)
            connection = await self._connected()
            if connection.version < 0:
                return  # until it has weights
            numbers = sorted(self._unsent & self._requests.keys())
            self._unsent.clear()
            requests = [
                (number, self._requests[number].prompt_ids, self._requests[number].sampling) for number in numbers
            ]
            connection.send(Generate(requests))
        except Died:
            pass  # `_ended` has seen to it
        except SluiceError as error:
            self._refuse(str(error))
        finally:
            self._posting = None
            has_none = self._connection is not None and self._connection.version < 0
            if self._unsent and not has_none and not self._closed and self._restarts_left >= 0:
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
