"""What runs inside an engine's process: an embedded engine with a model of its own, which takes requests from a socket.

The parent's side is `sluice.engines.process`. Both pickle, since both run the same code of the same user.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sluice.engines.embedded import EmbeddedEngine
from sluice.errors import EngineError, PromptTooLongError, SluiceError
from sluice.processes import belong_to
from sluice.types import Completion, Sampling
from sluice.weights.in_process import InProcessWeights
from sluice.weights.shared_memory import SharedWeights


@dataclass(frozen=True)
class Begin:
    """The first message."""

    engine: Callable[[], EmbeddedEngine]
    weights_fd: int
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
class Update:
    """Other weights are there."""

    version: int
    finish: bool
    """Whether the sequences that are decoded end with the weights that they began with."""


@dataclass(frozen=True)
class Fingerprint:
    """Asks for it."""


@dataclass(frozen=True)
class Answer:
    """To a request, by its number; to everything else, in the order in which it was asked, without one."""

    number: int | None
    value: Completion | str | None = None
    error: SluiceError | None = None


def serve(fd: int, parent: int) -> None:
    pipe = belong_to(parent, fd)
    try:
        asyncio.run(_serve(pipe))
    except (EOFError, ConnectionError):  # the parent closed its end, or died
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os.killpg(0, signal.SIGKILL)


async def _serve(pipe: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=pipe)
    server = _Server(writer)
    while True:
        await server.take(await read(reader))


class _Server:
    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.engine: EmbeddedEngine
        self.weights: SharedWeights
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.updating: asyncio.Task[None]

    async def take(self, message: Any) -> None:
        match message:
            case Begin():
                await self._begin(message)
            case Generate(requests):
                for number, prompt_ids, sampling in requests:
                    self.tasks[number] = asyncio.create_task(self._generate(number, prompt_ids, sampling))
            case Cancel(number):
                if task := self.tasks.get(number):
                    task.cancel()
            case Update(version, finish):
                self.updating = asyncio.create_task(self._answered(self._update(version, finish)))
            case Fingerprint():
                await self._answered(self.engine.fingerprint())
            case _:
                raise TypeError(f"a message that nobody sends: {message!r}")

    async def _begin(self, message: Begin) -> None:
        try:
            self.engine = message.engine()
            self.weights = SharedWeights(self.engine.model.named_weights(), message.weights_fd)
            await self._update(message.version, finish=False)
        except SluiceError as error:
            self._say(Answer(None, error=error))
        else:
            self._say(Answer(None))

    async def _update(self, version: int, finish: bool) -> None:
        if finish:
            await self.engine.finish_active()
        self.weights.read(self.engine.model.named_weights())
        await self.engine.update_weights(InProcessWeights(self.engine.model), version)

    async def _answered(self, work: Any) -> None:
        try:
            self._say(Answer(None, await work))
        except SluiceError as error:
            self._say(Answer(None, error=error))

    async def _generate(self, number: int, prompt_ids: list[int], sampling: Sampling) -> None:
        try:
            answer = Answer(number, await self.engine.generate(prompt_ids, sampling))
        except (EngineError, PromptTooLongError) as error:
            answer = Answer(number, error=type(error)(str(error)))  # without its cause, which need not pickle
        finally:
            self.tasks.pop(number, None)
        self._say(answer)

    def _say(self, answer: Answer) -> None:
        with suppress(ConnectionError):
            write(self.writer, answer)


async def read(reader: asyncio.StreamReader) -> Any:
    """The next message. Raises EOFError when there is none."""
    try:
        size = int.from_bytes(await reader.readexactly(8))
        return pickle.loads(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        raise EOFError from None


def write(writer: asyncio.StreamWriter, message: Any) -> None:
    body = pickle.dumps(message)
    writer.write(len(body).to_bytes(8) + body)
