"""What runs inside an engine's process: an embedded engine with a model of its own, which takes requests from a socket.

The parent's side is `sluice.engines.process`.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from sluice import connection
from sluice.connection import Alive, Answer, Ping, failed, write
from sluice.engines.embedded import EmbeddedEngine
from sluice.errors import EngineError, SluiceError
from sluice.processes import Parent, belong_to
from sluice.types import Sampling
from sluice.weights.in_process import InProcessWeights
from sluice.weights.publication import Inlet


@dataclass(frozen=True)
class Begin:
    """The first message; the second brings weights."""

    engine: Callable[[], EmbeddedEngine]
    inlet: Inlet


@dataclass(frozen=True)
class Generate:
    """Requests that were asked for together, and so are begun together."""

    requests: list[tuple[int, list[int], Sampling]]


@dataclass(frozen=True)
class Cancel:
    number: int


@dataclass(frozen=True)
class Update:
    """Other weights are at the inlet."""

    version: int
    finish: bool
    """Whether the sequences that are decoded end with the weights that they began with."""


@dataclass(frozen=True)
class Fingerprint:
    """Asks for it."""


@dataclass(frozen=True)
class Unfinished:
    """Asks for what is being made."""


def serve(fd: int, parent: Parent) -> NoReturn:
    connection.serve(belong_to(parent, fd), _Server)


class _Server:
    def __init__(self, writer: asyncio.StreamWriter, tasks: asyncio.TaskGroup) -> None:
        self.writer, self.tasks = writer, tasks
        self.engine: EmbeddedEngine
        self.inlet: Inlet
        self.requests: dict[int, asyncio.Task[None]] = {}
        self.is_updating = False

    async def take(self, message: Any) -> None:
        match message:
            case Begin():
                await self._answered(self._begin(message))
            case Generate(requests):
                for number, prompt_ids, sampling in requests:
                    self.requests[number] = self.tasks.create_task(self._generate(number, prompt_ids, sampling))
            case Cancel(number):
                if task := self.requests.get(number):
                    task.cancel()
            case Update(version, finish):
                self.tasks.create_task(self._answered(self._update(version, finish)))
            case Ping():
                self._say(Alive(self.engine.is_busy and not self.is_updating, self.engine.num_steps))
            case Fingerprint():
                await self._answered(self.engine.fingerprint())
            case Unfinished():
                await self._answered(self.engine.unfinished())
            case _:
                raise TypeError(f"a message that nobody sends: {message!r}")

    async def _begin(self, message: Begin) -> None:
        self.engine, self.inlet = message.engine(), message.inlet

    async def _update(self, version: int, finish: bool) -> None:
        """Read by a thread, so that what comes meanwhile is heard."""
        if finish:
            await self.engine.finish_active()
        async with self.engine.paused():
            self.is_updating = True  # which has a limit of its own
            try:
                await asyncio.to_thread(self.inlet.read, self.engine.model, version)
                await self.engine.update_weights(InProcessWeights(self.engine.model), version)
            finally:
                self.is_updating = False

    async def _answered(self, work: Awaitable[Any]) -> None:
        try:
            self._say(Answer(None, await work))
        except SluiceError as error:
            traceback.print_exc()
            self._say(failed(None, error))

    async def _generate(self, number: int, prompt_ids: list[int], sampling: Sampling) -> None:
        try:
            answer = Answer(number, await self.engine.generate(prompt_ids, sampling))
        except EngineError as error:
            answer = failed(number, error)
        finally:
            del self.requests[number]
        self._say(answer)

    def _say(self, answer: Answer | Alive) -> None:
        write(self.writer, answer)
