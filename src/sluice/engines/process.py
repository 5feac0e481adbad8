"""An embedded engine in a process of its own, with its own copy of the weights: it goes on generating while the trainer trains.

Where the process runs is the business of what starts it. One that dies fails what it was asked (EngineLostError); when it is given
weights, or asked for their fingerprint, it is started again, with the weights that were published last. What is then asked again, and
how often that may happen, is the router's to say.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from sluice.connection import Answer, Connection
from sluice.engines.deaths import Deaths
from sluice.engines.embedded import EmbeddedEngine, settled
from sluice.engines.serving import Begin, Cancel, Fingerprint, Generate, Unfinished, Update
from sluice.errors import EngineError, boundary
from sluice.interfaces import Weights
from sluice.processes import Died, Launch, start_failure
from sluice.types import Completion, Sampling
from sluice.weights.publication import PUBLISH_LIMIT_S, Link, Publication

START_LIMIT_S = 300.0
"""For its imports, and for making the model."""
ASK_LIMIT_S = 60.0
"""For what it can say at once."""


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
        name: str,
        synchronous: bool,
        finish_limit_s: float | None,
        hang_timeout_s: float,
        launch: Launch,
    ) -> None:
        """`publication` is how weights get to it, `launch` starts it somewhere. `engine` makes the engine in the other process, where it
        must be importable, with a model whose weights do not matter yet.

        `name` is that of its log. `synchronous`: nothing is asked while weights change, and requests that are asked for together are
        begun together. `finish_limit_s`: completions that were begun end with the weights that they began with, for which a publication
        waits so long at most; None: they go on with the new ones. `hang_timeout_s`: it is killed when it gives no sign of life for so long.
        """
        self._name = name
        self._engine = engine
        self._synchronous = synchronous
        self._finish_limit_s = finish_limit_s
        self._hang_timeout_s = hang_timeout_s
        self._path, self._folder = list(sys.path), os.getcwd()  # a replacement finds what the first one found
        self._publication, self._launch = publication, launch
        self._link: Link
        """With the process that is connected."""
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()
        self._asking = asyncio.Lock()
        """Answers come in the order of what was asked."""
        self._deaths = Deaths()
        self._numbers = count()
        self._requests: dict[int, _Request] = {}
        """All that are not answered, in the order in which they came."""
        self._unsent: set[int] = set()
        self._posting: asyncio.Task[None] | None = None
        self._closed = False

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """As the embedded engine does. Raises EngineLostError too, when the process dies or there is none."""
        if self._closed:
            raise EngineError("the engine is closed")
        if self._connection is None:
            raise self._deaths.last("it has no process")
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._requests[number] = _Request(list(prompt_ids), sampling, answer)
        self._unsent.add(number)
        if self._posting is None:
            self._posting = asyncio.create_task(self._post())
        try:
            return await answer
        finally:
            del self._requests[number]
            if answer.cancelled() and self._connection:
                self._connection.send(Cancel(number))

    async def update_weights(self, weights: Weights, version: int) -> int:
        """Starts a process if there is none. Raises EngineLostError when it dies, EngineError when it cannot be started."""
        num_bytes = await self._publication.publish(weights, version)
        connection = await self._connected()
        with self._telling(connection.number):
            await self._deliver(connection)
        return num_bytes

    async def fingerprint(self) -> str | None:
        """Starts and raises as `update_weights`; and WeightsMoved when it can have no weights before the next ones."""
        connection = await self._connected()
        with self._telling(connection.number):
            await self._deliver(connection)
            async with self._asking:
                return await connection.ask(Fingerprint(), PUBLISH_LIMIT_S)

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
        self._fail(lambda: EngineError("the engine was closed"))
        self._publication.close()

    def belongs_to(self, folder: Path) -> None:
        """A run with this folder; what the process prints goes to a file there."""
        self._deaths.log = folder / f"{self._name}.log"
        self._publication.belongs_to(folder)

    def status(self) -> str:
        """What it does at the moment, for people."""
        connection = self._connection
        if connection is None:
            return "a process that is starting" if self._connecting.locked() else "no process"
        weights = f"weights of version {connection.version}" if connection.version >= 0 else "no weights yet"
        return f"{connection.process}: {len(self._requests)} completions are asked for; {weights}"

    # -- the process --

    async def _connected(self) -> Connection:
        async with self._connecting:
            if self._connection is None:
                if self._closed:
                    raise EngineError("the engine is closed")
                number = self._deaths.count_start()
                with self._telling(number):
                    self._connection = await self._started(number)
            return self._connection

    async def _started(self, number: int) -> Connection:
        """A new process, with an engine that has no weights yet. Raises Died, or EngineError."""
        with boundary(EngineError, "the engine's process could not be started"):
            process = self._launch(
                "sluice.engines.serving", path=self._path, folder=self._folder, log=self._deaths.log, variables={}
            )
        connection = None
        try:
            pipe = await asyncio.to_thread(process.connect)
            connection = Connection(process, *await asyncio.open_connection(sock=pipe), self._take, self._ended)
            connection.number = number
            self._link = self._publication.link(self._name)
            await connection.ask(Begin(self._engine, self._link.inlet), START_LIMIT_S)
        except BaseException as error:
            connection.end(f"it did not start: {error}") if connection else process.kill()
            raise start_failure(error, number, "the engine's process could not be started", self._deaths.see) from error
        connection.watch(self._hang_timeout_s)
        return connection

    async def _deliver(self, connection: Connection) -> None:
        """The weights that were published last; and again, if others were while it took them over."""

        async def take_over() -> None:
            assert self._publication.version is not None
            update = Update(self._publication.version, finish=self._finish_limit_s is not None)
            await connection.ask(update, PUBLISH_LIMIT_S + (self._finish_limit_s or 0.0))
            connection.version = update.version

        async with self._asking:
            while (version := self._publication.version) not in (None, connection.version):
                await self._link.deliver(version, take_over)

    def _ended(self, connection: Connection, cause: str) -> None:
        if self._connection is connection:
            self._connection = None
        if not self._closed and not self._fail(lambda: self._deaths.told(cause, connection.number)):
            self._deaths.keep(cause, connection.number)

    @contextmanager
    def _telling(self, number: int) -> Generator[None]:
        """Around what is asked of the process with that number."""
        try:
            yield
        except Died as error:
            raise self._deaths.told(str(error), number) from None

    # -- requests --

    async def _post(self) -> None:
        """Those that are asked for together, in one message."""
        try:
            if self._synchronous:
                await settled(self._unsent)
            numbers = sorted(self._unsent & self._requests.keys())
            self._unsent.clear()
            requests = [
                (number, self._requests[number].prompt_ids, self._requests[number].sampling) for number in numbers
            ]
            if self._connection:  # else they have been failed
                self._connection.send(Generate(requests))
        finally:
            self._posting = None

    def _take(self, number: int, answer: Answer) -> None:
        request = self._requests.get(number)
        if request is None or request.answer.done():
            return
        if answer.error:
            request.answer.set_exception(answer.error)
        else:
            assert isinstance(answer.value, Completion)
            request.answer.set_result(answer.value)

    def _fail(self, error: Callable[[], EngineError]) -> bool:
        """Whether there was a request to fail."""
        self._unsent.clear()
        open_ones = [request.answer for request in self._requests.values() if not request.answer.done()]
        for answer in open_ones:
            answer.set_exception(error())
        return bool(open_ones)
