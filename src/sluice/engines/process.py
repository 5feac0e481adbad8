"""An embedded engine in a process of its own, with its own copy of the weights: it goes on generating while the trainer trains.

One that dies fails what it was asked (EngineLostError); when it is asked for its fingerprint, or given weights, it is started again, with
the weights that were published last. What is then asked again, and how often that may happen, is the router's to say.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from sluice.connection import Answer, Connection, Died
from sluice.engines.embedded import EmbeddedEngine, settled
from sluice.engines.serving import Begin, Cancel, Fingerprint, Generate, Load, Update
from sluice.errors import EngineError, EngineLostError, SluiceError, boundary
from sluice.interfaces import Weights
from sluice.processes import Process
from sluice.types import Completion, Sampling
from sluice.weights.shared_memory import PublishedWeights

START_LIMIT_S = 300.0
"""For its imports, and for making the model."""
PUBLISH_LIMIT_S = 300.0
"""For taking over weights, and for their fingerprint."""


@dataclass(frozen=True)
class _Request:
    prompt_ids: list[int]
    sampling: Sampling
    answer: asyncio.Future[Completion]


class EngineProcess:
    def __init__(
        self,
        published: PublishedWeights,
        engine: Callable[[Load], EmbeddedEngine],
        *,
        synchronous: bool,
        finish_limit_s: float | None,
        hang_timeout_s: float,
        start: Callable[..., Process] = Process,
    ) -> None:
        """`engine` makes the engine in the other process, where it must be importable; its model has weights like those that are
        `published`, and `Load` puts the numbers into them.

        `synchronous`: nothing is asked while weights change, and requests that are asked for together are begun together.
        `finish_limit_s`: completions that were begun end with the weights that they began with, for which a publication waits so
        long at most; None: they go on with the new ones. `hang_timeout_s`: it is killed when it gives no sign of life for so long.
        """
        self.log: Path | None = None
        """File for what the process prints; it is told before there is one."""
        self._published = published
        self._engine = engine
        self._synchronous = synchronous
        self._finish_limit_s = finish_limit_s
        self._hang_timeout_s = hang_timeout_s
        self._start = start
        self._path, self._folder = list(sys.path), os.getcwd()  # a replacement finds what the first one found
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()
        self._untold = ""
        """How the last process ended, as long as nobody was told."""
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
            raise self._lost(self._untold or "its process was not started")
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

    async def update_weights(self, weights: Weights, version: int) -> None:
        """Starts a process if there is none. Raises EngineLostError when it dies, EngineError when it cannot be started."""
        await self._published.publish(weights, version)
        connection = await self._connected()
        with self._telling():
            await self._bring_up_to_date(connection)

    async def fingerprint(self) -> str | None:
        """Starts and raises as `update_weights`."""
        connection = await self._connected()
        with self._telling():
            return await connection.ask(Fingerprint(), PUBLISH_LIMIT_S)

    async def close(self) -> None:
        self._closed = True
        if self._posting:
            self._posting.cancel()
        if self._connection:
            self._connection.end("the engine was closed")
        self._fail(EngineError, "the engine was closed")

    def status(self) -> str:
        """What it does at the moment, for people."""
        connection = self._connection
        if connection is None:
            return "a process that is starting" if self._connecting.locked() else "no process"
        return (
            f"process {connection.process.pid}: {len(self._requests)} completions are asked for; weights of version "
            f"{connection.version}"
        )

    # -- the process --

    async def _connected(self) -> Connection:
        async with self._connecting:
            if self._connection:
                return self._connection
            if self._closed:
                raise EngineError("the engine is closed")
            if self._untold:
                raise self._lost(self._untold)
            with self._telling():
                self._connection = await self._begun()
            return self._connection

    async def _begun(self) -> Connection:
        """A new process, whose engine has the weights that were published last. Raises Died, or EngineError."""
        memory = self._published.memory
        with boundary(EngineError, "the engine's process could not be started"):
            process = self._start(
                "sluice.engines.serving",
                path=self._path,
                folder=self._folder,
                log=self.log,
                variables={},
                pass_fds=[memory.fd],
            )
        try:
            reader, writer = await asyncio.open_connection(sock=process.socket)
        except BaseException:
            process.kill()
            raise
        connection = Connection(process, reader, writer, self._take, self._ended)
        try:
            connection.version = await self._published.version()
            await connection.ask(Begin(self._engine, memory.fd, connection.version), START_LIMIT_S)
            await self._bring_up_to_date(connection)
        except BaseException as error:
            connection.end(f"it did not start: {error}")
            if isinstance(error, SluiceError) and not isinstance(error, Died):
                raise EngineError(f"the engine's process could not be started: {error}{self._see}") from error
            raise
        connection.watch(self._hang_timeout_s)
        return connection

    async def _bring_up_to_date(self, connection: Connection) -> None:
        """Once, and again if others were published while it took them over."""
        while connection.version != (version := await self._published.version()):
            update = Update(version, finish=self._finish_limit_s is not None)
            await connection.ask(update, PUBLISH_LIMIT_S + (self._finish_limit_s or 0.0))
            connection.version = version

    def _ended(self, connection: Connection, cause: str) -> None:
        if self._connection is connection:
            self._connection = None
        if not self._closed:
            self._untold = cause
            self._fail(EngineLostError, f"{cause}{self._see}")

    @contextmanager
    def _telling(self) -> Generator[None]:
        try:
            yield
        except Died as error:
            raise self._lost(str(error)) from None

    def _lost(self, cause: str) -> EngineLostError:
        self._untold = ""
        return EngineLostError(f"{cause}{self._see}")

    @property
    def _see(self) -> str:
        return f"; see {self.log}" if self.log and self.log.exists() and self.log.stat().st_size else ""

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

    def _fail(self, kind: type[EngineError], what: str) -> None:
        self._unsent.clear()
        for request in self._requests.values():
            if not request.answer.done():
                request.answer.set_exception(kind(what))
                self._untold = ""
