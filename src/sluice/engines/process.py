"""An embedded engine in a process of its own, with its own copy of the weights: it goes on generating while the trainer trains.

Where the process runs is the business of what starts it: on this machine, or on another, which is sent the weights.

One that dies is started again with the weights that were published last, and told again what it had not answered; since what a
request draws depends on its seed only, no sample is lost.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from sluice.connection import Answer, Connection
from sluice.engines.embedded import EmbeddedEngine, settled
from sluice.engines.serving import Begin, Bucket, Cancel, Fingerprint, Generate, Load, Update
from sluice.errors import EngineError, SluiceError, boundary
from sluice.interfaces import Weights
from sluice.processes import Died, Launch, Process
from sluice.types import Completion, Sampling
from sluice.weights.shared_memory import SharedWeights

START_LIMIT_S = 300.0
"""For its imports, and for making the model."""
PUBLISH_LIMIT_S = 300.0
"""For taking over weights, and for their fingerprint."""
BUCKET_BYTES = 64 * 2**20
"""Of weights, in one message to another machine."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Request:
    prompt_ids: list[int]
    sampling: Sampling
    answer: asyncio.Future[Completion]


class EngineProcess:
    def __init__(
        self,
        weights: Iterable[tuple[str, Tensor]],
        engine: Callable[[Load], EmbeddedEngine],
        *,
        synchronous: bool,
        finish_limit_s: float | None,
        max_restarts: int,
        launch: Launch | None = None,
    ) -> None:
        """`weights` say what is published: tensors of these names, shapes and dtypes, of which the numbers do not matter yet.
        `engine` makes the engine in the other process, where it must be importable; its model has such weights, and `Load` puts the
        numbers into them.

        `synchronous`: nothing is asked while weights change, and requests that are asked for together are begun together.
        `finish_limit_s`: completions that were begun end with the weights that they began with, for which a publication waits so
        long at most; None: they go on with the new ones.
        `launch` starts the process somewhere; None: on this machine, where it sees the memory through which weights are published.
        """
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
        self._shared = SharedWeights(weights)
        self._launch: Launch = launch or partial(Process, pass_fds=[self._shared.fd])
        self._weights_fd = None if launch else self._shared.fd
        self._connection: Connection | None = None
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
        """Raises EngineError when the process has died more often than it may."""
        async with self._connecting:  # one that begins reads them
            await weights.copy_to(self._shared)
            self.version = version
        await self._persistently(self._publish)

    async def _publish(self, connection: Connection) -> None:
        if connection.version != self.version:
            await self._send_weights(connection)
            update = Update(self.version, finish=self._finish_limit_s is not None)
            await connection.ask(update, PUBLISH_LIMIT_S + (self._finish_limit_s or 0.0))
            connection.version = self.version

    async def _send_weights(self, connection: Connection) -> None:
        """To a process that does not see them; to the end, or it dies: half of them are taken over by none."""
        if self._weights_fd is None:
            for start in range(0, self._shared.num_bytes, BUCKET_BYTES):
                await connection.ask(Bucket(start, self._shared.part(start, BUCKET_BYTES)), PUBLISH_LIMIT_S)

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
        no_process = "a process that is starting" if self._connecting.locked() else "no process"
        where = str(connection.process) if connection else no_process
        return f"{where}: {len(self._requests)} completions are asked for; weights of version {self.version}"

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
                process = self._launch(
                    "sluice.engines.serving", path=self._path, folder=self._folder, log=self.log, variables={}
                )
            try:
                pipe = await asyncio.to_thread(process.connect)
                reader, writer = await asyncio.open_connection(sock=pipe)
            except BaseException as error:
                process.kill()
                if isinstance(error, Died):
                    self._count_death(str(error))
                raise
            connection = Connection(process, reader, writer, self._take, self._ended)
            try:
                await connection.ask(Begin(self._engine, self._weights_fd, self.version), START_LIMIT_S)
                if self._weights_fd is None:
                    await self._publish(connection)
            except BaseException as error:
                connection.end(f"it did not start: {error}")
                if isinstance(error, SluiceError) and not isinstance(error, Died):
                    raise EngineError(f"the engine's process could not be started: {error}{self._see}") from error
                raise
            connection.version = self.version
            self._connection = connection
            return connection

    def _ended(self, connection: Connection, cause: str) -> None:
        """What it had not answered is asked again."""
        if self._connection is connection:
            self._connection = None
        self._count_death(cause)

    def _count_death(self, cause: str) -> None:
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
        except Died:
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
