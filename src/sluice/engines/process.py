"""An embedded engine in a process of its own, with its own copy of the weights: it goes on generating while the trainer trains.

One that dies is started again with the weights that were published last, and what it was asked is asked again by whoever asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import sys
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from sluice.engines.embedded import EmbeddedEngine
from sluice.engines.serving import Answer, Begin, Cancel, Fingerprint, Generate, Update, read, write
from sluice.errors import EngineError, SluiceError
from sluice.interfaces import LanguageModel, Weights
from sluice.processes import Process
from sluice.types import Completion, Sampling
from sluice.weights.shared_memory import SharedWeights

START_LIMIT_S = 300.0
"""For its imports, and for loading the model."""


class EngineProcess:
    def __init__(
        self,
        model: LanguageModel,
        engine: Callable[[], EmbeddedEngine],
        *,
        finish: bool,
        update_limit_s: float,
        max_restarts: int,
    ) -> None:
        """`engine` makes the engine in the other process, where it must be importable; its model has the weights of `model`, by name
        and shape. `finish`: completions that were begun end with the weights that they began with, and new weights wait for them."""
        self.model = model
        self.version = 0
        self.log: Path | None = None
        """File for what the process prints; it is told before there is one."""
        self._engine = engine
        self._finish = finish
        self._update_limit_s = update_limit_s
        self._restarts_left = max_restarts
        self._max_restarts = max_restarts
        self._path, self._folder = list(sys.path), os.getcwd()
        self._shared = SharedWeights(model.named_weights())
        self._process: Process | None = None
        self._process_version = -1
        """Of the weights that it has."""
        self._writer: asyncio.StreamWriter
        self._listener: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._numbers = count()
        self._requests: dict[int, asyncio.Future[Completion]] = {}
        self._asked: deque[asyncio.Future[Any]] = deque()
        """What was asked besides completions, in order."""
        self._outbox: list[tuple[int, list[int], Sampling]] = []
        self._posting: asyncio.Task[None] | None = None
        self._closed = False

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """As the embedded engine does. Raises EngineError too when the process dies meanwhile."""
        if self._closed:
            raise EngineError("the engine is closed")
        number = next(self._numbers)
        future = self._requests[number] = asyncio.get_running_loop().create_future()
        self._outbox.append((number, list(prompt_ids), sampling))
        if self._posting is None:
            self._posting = asyncio.create_task(self._post())
        try:
            return await future
        finally:
            del self._requests[number]
            if future.cancelled() and self._process:
                self._send(Cancel(number))

    async def update_weights(self, weights: Weights, version: int) -> None:
        """Raises EngineError for another model's weights, and when the process cannot be kept alive."""
        if weights.model is not self.model:
            raise EngineError("the engine's process was made for another model than the one whose weights it is given")
        async with self._starting:  # one that begins reads them
            self._shared.write(self.model.named_weights())
            self.version = version
        while self._process_version != version:
            try:
                await self._started()  # with them, if it was not there
                if self._process_version != version:
                    await self._ask(Update(version, self._finish))
                    self._process_version = version
            except EngineError as error:
                if self._process:  # it refuses
                    raise
                if self._restarts_left < 0:
                    raise self._died_too_often() from error

    async def fingerprint(self) -> str | None:
        await self._started()
        return await self._ask(Fingerprint())

    async def close(self) -> None:
        self._closed = True
        if self._posting:
            self._posting.cancel()
        if self._listener:
            self._listener.cancel()
        if self._process:
            self._lost(self._process, "the engine was closed")
        self._refuse_outbox("the engine was closed")
        self._shared.close()

    def status(self) -> str:
        """What it does at the moment, for people."""
        where = f"process {self._process.pid}" if self._process else "no process"
        return f"{where}: {len(self._requests)} completions are asked for; weights of version {self.version}"

    # -- the process --

    async def _started(self) -> None:
        """Returns when it runs. Raises EngineError when it cannot be started, or has died too often."""
        async with self._starting:
            if self._process:
                return
            if self._closed:
                raise EngineError("the engine is closed")
            if self._restarts_left < 0:
                raise self._died_too_often()
            process = Process(
                "sluice.engines.serving",
                path=self._path,
                folder=self._folder,
                log=self.log,
                variables={},
                pass_fds=[self._shared.fd],
            )
            reader, self._writer = await asyncio.open_connection(sock=process.socket)
            self._process = process
            self._listener = asyncio.create_task(self._listen(reader, process))
            version = self.version
            try:
                await self._ask(Begin(self._engine, self._shared.fd, version), START_LIMIT_S)
            except BaseException:
                self._lost(process, "the engine's process could not start")
                raise
            self._process_version = version

    async def _listen(self, reader: asyncio.StreamReader, process: Process) -> None:
        """Hand out what it answers, until it dies."""
        with contextlib.suppress(EOFError, pickle.UnpicklingError):
            while True:
                self._take(await read(reader))
        cause, _ = await asyncio.to_thread(process.cause_of_death)
        self._lost(process, f"the engine: {cause}{self._see}")

    def _take(self, answer: Answer) -> None:
        future: asyncio.Future[Any] | None
        future = self._asked.popleft() if answer.number is None else self._requests.get(answer.number)
        if future is None or future.done():
            return
        if answer.error:
            future.set_exception(answer.error)
        else:
            future.set_result(answer.value)

    def _lost(self, process: Process, what: str) -> None:
        """It is gone, and with it all that it was asked; nothing, if that is known already."""
        if self._process is not process:
            return
        self._process, self._process_version = None, -1
        self._restarts_left -= 1
        self._writer.transport.abort()
        process.kill()
        unsent = {number for number, *_ in self._outbox}
        for future in [*self._asked, *(f for number, f in self._requests.items() if number not in unsent)]:
            if not future.done():
                future.set_exception(EngineError(what))
        self._asked.clear()

    def _died_too_often(self) -> EngineError:
        times = self._max_restarts + 1
        return EngineError(f"the engine's process died {times} times (limit: engine.max_restarts){self._see}")

    @property
    def _see(self) -> str:
        return f"; see {self.log}" if self.log else ""

    # -- messages --

    def _send(self, message: Any) -> None:
        with contextlib.suppress(ConnectionError):  # that it is dead is told by the listener
            write(self._writer, message)

    async def _ask(self, message: Any, limit_s: float | None = None) -> Any:
        """Raises EngineError when it dies meanwhile; it is killed when it does not answer in time."""
        future = asyncio.get_running_loop().create_future()
        self._asked.append(future)
        self._send(message)
        limit_s = limit_s or self._update_limit_s
        try:
            async with asyncio.timeout(limit_s):
                return await future
        except TimeoutError:
            if self._process:
                self._lost(self._process, "the engine's process was killed")
            raise EngineError(f"the engine's process gave no answer within {limit_s:g} s and was killed") from None

    async def _post(self) -> None:
        """Send what was asked, once every task that can ask has asked: so that what is decoded side by side, and with it the last bit
        of the log-probs, does not depend on scheduling."""
        try:
            quiet = 0
            for _ in range(100):
                seen = len(self._outbox)
                await asyncio.sleep(0)
                quiet = quiet + 1 if len(self._outbox) == seen else 0
                if quiet == 5:
                    break
            await self._started()
            requests = [request for request in self._outbox if request[0] in self._requests]
            self._outbox.clear()
            self._send(Generate(requests))
        except SluiceError as error:
            self._refuse_outbox(str(error))
        finally:
            self._posting = None

    def _refuse_outbox(self, what: str) -> None:
        for number, *_ in self._outbox:
            if (future := self._requests.get(number)) and not future.done():
                future.set_exception(EngineError(what))
        self._outbox.clear()
