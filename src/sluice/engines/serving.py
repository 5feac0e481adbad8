"""What runs inside an engine's process: an embedded engine with a model of its own, which takes requests from a socket.

The parent's side is `sluice.engines.process`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from sluice.connection import Answer, failed, read, write
from sluice.engines.embedded import EmbeddedEngine
from sluice.errors import EngineError, SluiceError
from sluice.interfaces import LanguageModel
from sluice.processes import belong_to
from sluice.types import Sampling
from sluice.weights.in_process import InProcessWeights
from sluice.weights.shared_memory import SharedWeights

Load = Callable[[LanguageModel], None]
"""Puts the published weights into a model."""


@dataclass(frozen=True)
class Begin:
    """The first message."""

    engine: Callable[[Load], EmbeddedEngine]
    weights_fd: int | None
    """Of the memory where the weights are; None: on another machine, and they will be sent."""
    version: int
    """Of the weights that are there."""


@dataclass(frozen=True)
class Generate:
    """Requests that were asked for together, and so are begun together."""

    requests: list[tuple[int, list[int], Sampling]]


@dataclass(frozen=True)
class Cancel:
    number: int


@dataclass(frozen=True)
class Bucket:
    """Weights for a process that sees no memory of the trainer's; they are taken over with the `Update` after the last one."""

    start: int
    """Of these bytes among all."""
    part: bytes


@dataclass(frozen=True)
class Update:
    """Other weights are there."""

    version: int
    finish: bool
    """Whether the sequences that are decoded end with the weights that they began with."""


@dataclass(frozen=True)
class Fingerprint:
    """Asks for it."""


def serve(fd: int, parent: int) -> None:
    pipe = belong_to(parent, fd)
    try:
        asyncio.run(_serve(pipe))
    except BaseException:
        traceback.print_exc()
    os._exit(1)


async def _serve(pipe: socket.socket) -> None:
    """What goes wrong unforeseen in any task ends the process, and the parent starts another."""
    reader, writer = await asyncio.open_connection(sock=pipe)
    async with asyncio.TaskGroup() as tasks:
        server = _Server(writer, tasks)
        while True:
            try:
                message = await read(reader)
            except EOFError:  # the parent closed its end, or died
                os.killpg(0, signal.SIGKILL)
            await server.take(message)


class _Server:
    def __init__(self, writer: asyncio.StreamWriter, tasks: asyncio.TaskGroup) -> None:
        self.writer, self.tasks = writer, tasks
        self.engine: EmbeddedEngine
        self.weights: SharedWeights
        self.requests: dict[int, asyncio.Task[None]] = {}

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
            case Bucket(start, part):
                await self._answered(self._fill(start, part))
            case Update(version, finish):
                self.tasks.create_task(self._answered(self._update(version, finish)))
            case Fingerprint():
                await self._answered(self.engine.fingerprint())
            case _:
                raise TypeError(f"a message that nobody sends: {message!r}")

    async def _begin(self, message: Begin) -> None:
        def load(model: LanguageModel) -> None:
            self.weights = SharedWeights(model.named_weights(), message.weights_fd)
            if message.weights_fd is not None:
                self.weights.read(model.named_weights())

        self.engine = message.engine(load)
        self.engine.version = message.version

    async def _fill(self, start: int, part: bytes) -> None:
        self.weights.fill(start, part)

    async def _update(self, version: int, finish: bool) -> None:
        if finish:
            await self.engine.finish_active()
        self.weights.read(self.engine.model.named_weights())
        await self.engine.update_weights(InProcessWeights(self.engine.model), version)

    async def _answered(self, work: Awaitable[str | None]) -> None:
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

    def _say(self, answer: Answer) -> None:
        write(self.writer, answer)
