"""An engine that is a server of its own, vLLM or SGLang: started and stopped by us, or there already at some address.

One that dies fails what it was asked (EngineLostError); when it is given weights, or asked for their fingerprint, it is started again,
with the weights that were published last. What is then asked again, and how often that may happen, is the router's to say.

Completions that live through a publication know of each token which weights made it: from the server where it says so, else because it gives
back what it has at the publication, and the rest is asked for afterwards.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from sluice.connection import Connection, Died
from sluice.engines.dialect import POLL_S, STATUS_LIMIT_S, Dialect, Reply
from sluice.engines.guard import STOP_LIMIT_S, Start, Stop
from sluice.engines.http import HttpClient, HttpError
from sluice.engines.pieces import Decode, extend
from sluice.engines.sampling import check_ids, check_room
from sluice.errors import EngineError, EngineLostError, boundary
from sluice.interfaces import Weights
from sluice.processes import Launch, start_failure
from sluice.types import Completion, Sampling
from sluice.weights.disk import Disk

LAUNCH_LIMIT_S = 60.0
"""For the guard to start the server's program, which then still has to load."""
LEAVE_LIMIT_S = 5.0
"""How long a server whose answer broke off may take to end, before it is held to be alive."""
BROKEN_ANSWERS = 3
"""How often one request may go wrong at a server that is alive."""
TICKS = 10
"""Times that it is looked at within `hang_timeout_s`."""


class _Server:
    """One that runs, from its start to its end."""

    def __init__(self, url: str, number: int, key: str | None = None) -> None:
        self.http = HttpClient(url, key)
        self.number = number
        """Which of its engine's servers it is."""
        self.connection: Connection | None = None
        """With its guard, where we have started it."""
        self.version = -1
        """Of the weights that it has."""
        self.is_asleep = False
        self.over = asyncio.Event()
        self.cause = ""
        """Of its end."""
        self.watching: asyncio.Task[None] | None = None
        self.closing: asyncio.Task[None] | None = None


class ServerEngine:
    def __init__(
        self,
        dialect: Dialect,
        publication: Disk,
        *,
        name: str,
        url: str | None,
        decode: Decode,
        vocab_size: int,
        max_model_len: int,
        finish_limit_s: float | None,
        start_limit_s: float,
        hang_timeout_s: float,
        launch: Launch,
    ) -> None:
        """With a `url` the server is there, and is never started; without one `launch` starts it somewhere, when weights are published
        for the first time. `name` is that of its log. `decode` turns ids into text, for stop strings only.

        `finish_limit_s`: completions that were begun end with the weights that they began with, for which a publication waits so long at
        most; None: they go on with the new ones. `hang_timeout_s`: it is killed when it gives no sign of life for so long.
        """
        self._dialect, self._publication, self._name, self._url, self._launch = dialect, publication, name, url, launch
        self._log: Path | None = None
        self._decode, self._vocab_size, self._max_model_len = decode, vocab_size, max_model_len
        self._finish_limit_s, self._start_limit_s = finish_limit_s, start_limit_s
        self._hang_timeout_s = hang_timeout_s
        self._path, self._folder = list(sys.path), os.getcwd()  # a replacement finds what the first one found
        self._server: _Server | None = None
        self._num_started = 0
        self._untold: EngineLostError | None = None
        """The end of the last one, as long as nobody was told."""
        self._connecting, self._delivering = asyncio.Lock(), asyncio.Lock()
        self._may_begin = asyncio.Event()
        """Not while weights change."""
        self._num_open = self._num_asked = 0
        """Completions that we owe, and requests that the server has."""
        self._none_asked = asyncio.Event()
        self._none_asked.set()
        self._begun: dict[int, Completion] = {}
        """By its seed, what a server has given back of a completion that is not whole."""
        self._closed = False

    # -- generation --

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Raises PromptTooLongError when prompt and completion do not fit the window, EngineLostError when the server dies, cannot be
        reached or is not there, EngineError when it refuses. Cancelling the call aborts it at the server."""
        check_room(prompt_ids, sampling, self._max_model_len)
        check_ids(prompt_ids, self._vocab_size)
        self._num_open += 1
        try:
            return await self._whole(prompt_ids, sampling)
        finally:
            self._num_open -= 1
            self._begun.pop(sampling.seed, None)

    async def _whole(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """In as many requests as publications come in between."""
        done = Completion([], [], "abort", [], sampling.temperature)
        last, given_up = -1, 0
        while done.finish_reason == "abort":
            reply, version = await self._reply(prompt_ids, sampling, done)
            extend(done, reply, version, sampling, self._decode)
            given_up = given_up + 1 if version == last else 0
            if given_up == BROKEN_ANSWERS:
                raise EngineError(f"{self._who} gave up a completion {given_up} times without new weights{self._see}")
            last = version
            if done.token_ids:
                self._begun[sampling.seed] = done
        if not any(done.kept_ids):
            done.kept_ids = []
        return done

    async def _reply(self, prompt_ids: Sequence[int], sampling: Sampling, done: Completion) -> tuple[Reply, int]:
        """To the prompt and what is done of the completion, and the version that the server had when it was asked."""
        num_done = len(done.token_ids)
        rest = replace(
            sampling,
            max_new_tokens=sampling.max_new_tokens - num_done,
            seed=sampling.seed + sampling.num_drawn + num_done,  # what comes is not drawn as what came
        )
        for broken in range(1, BROKEN_ANSWERS + 1):
            await self._may_begin.wait()
            server = self._server
            if server is None:
                if self._closed:
                    raise EngineError("the engine is closed")
                raise self._untold_loss() or self._loss("it does not run", self._num_started)
            version = server.version
            try:
                with self._asked():
                    return await self._dialect.generate(server.http, [*prompt_ids, *done.token_ids], rest), version
            except HttpError as error:
                if error.status < 500:
                    raise EngineError(f"{self._who} refuses a completion: {error}{self._see}") from error
                cause: Exception = error
            except OSError as error:
                cause = error
            if await self._is_over(server, cause):
                raise self._told_loss(server.cause, server.number) from cause
            if broken == BROKEN_ANSWERS:
                raise EngineError(f"{self._who} failed {broken} times in a row: {cause}{self._see}") from cause
            await asyncio.sleep(POLL_S)
        raise AssertionError("the last try returns or raises")

    @contextmanager
    def _asked(self) -> Generator[None]:
        """Counts a request while the server has it."""
        self._num_asked += 1
        self._none_asked.clear()
        try:
            yield
        finally:
            self._num_asked -= 1
            if not self._num_asked:
                self._none_asked.set()

    async def unfinished(self) -> dict[int, Completion]:
        """Of those that were given back at a publication, what they had then; the server does not say more."""
        copied = {
            seed: (list(c.token_ids), list(c.logprobs), list(c.policy_versions), list(c.kept_ids), c.temperature)
            for seed, c in self._begun.items()
        }
        return {
            seed: Completion(tokens, logprobs, "abort", versions, temperature, kept_ids=kept if any(kept) else [])
            for seed, (tokens, logprobs, versions, kept, temperature) in copied.items()
        }

    # -- weights --

    async def update_weights(self, weights: Weights, version: int) -> int:
        """Starts a server if there is none. Raises EngineLostError when it dies, EngineError when it cannot be started, or does not take
        the weights."""
        num_bytes = await self._publication.publish(weights, version)
        server = await self._connected()
        await self._deliver(server)
        return num_bytes

    async def fingerprint(self) -> str | None:
        """Starts and raises as `update_weights`."""
        server = await self._connected()
        await self._deliver(server)
        said: list[str] = []

        async def ask() -> None:
            said.append(await self._dialect.fingerprint(server.http, self._publication.of(server.version)))

        async with self._telling(server):
            await self._link.deliver(server.version, ask)  # the folder stays as long as it is read
        return said[0]

    async def _deliver(self, server: _Server) -> None:
        """The weights that were published last; and again, if others were while it took them over."""

        async def take_over() -> None:
            assert self._publication.version is not None
            await self._load(server, self._publication.version)

        async with self._delivering:
            while (version := self._publication.version) not in (None, server.version):
                async with self._telling(server):
                    await self._link.deliver(version, take_over)

    async def _load(self, server: _Server, version: int) -> None:
        dialect, http = self._dialect, server.http
        self._may_begin.clear()
        try:
            if self._finish_limit_s is not None:
                await self._finished(self._finish_limit_s)
            await (dialect.wake(http, "weights") if server.is_asleep else dialect.pause(http))
            await dialect.load(http, self._publication.of(version), version)
            if server.is_asleep:
                await dialect.wake(http, "kv_cache")
            await dialect.resume(http)
            server.is_asleep, server.version = False, version
        finally:
            self._may_begin.set()

    async def _finished(self, limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await self._none_asked.wait()
        except TimeoutError:
            raise EngineError(
                f"{self._num_asked} completions did not end within {limit_s:g} s (rollout.timeout_s), and engine.on_new_weights=finish "
                "lets no weights be published before"
            ) from None

    async def sleep(self) -> None:
        """Give the device's memory to the trainer, until weights are published; what is asked for meanwhile waits."""
        server = self._server
        if server is None or server.is_asleep:
            return
        self._may_begin.clear()
        try:
            async with self._telling(server):
                await self._dialect.sleep(server.http)
                server.is_asleep = True
        except EngineLostError as loss:  # of no matter to the trainer, which has the memory now
            self._untold = loss

    # -- the server --

    @asynccontextmanager
    async def _telling(self, server: _Server) -> AsyncGenerator[None]:
        """Around requests: what goes wrong with them is that the server is lost (EngineLostError), or refuses (EngineError)."""
        try:
            yield
        except (HttpError, OSError, ValueError) as error:
            refused = isinstance(error, HttpError) and error.status < 500
            if not refused and await self._is_over(server, error):
                raise self._told_loss(server.cause, server.number) from error
            raise EngineError(f"{self._who}: {type(error).__name__}: {error}{self._see}") from error

    async def _connected(self) -> _Server:
        """Starts one if there is none. Raises EngineError when that cannot be done."""
        async with self._connecting:
            if self._server is None:
                if self._closed:
                    raise EngineError("the engine is closed")
                if loss := self._untold_loss():
                    raise loss
                self._may_begin.clear()  # it has no weights yet
                self._num_started += 1
                try:
                    self._server = await (self._found(self._url) if self._url else self._started())
                except BaseException as error:
                    self._may_begin.set()  # who waits is told
                    if isinstance(error, Died):
                        raise self._told_loss(str(error), self._num_started) from None
                    raise
            return self._server

    async def _found(self, url: str) -> _Server:
        server = _Server(url, self._num_started)
        try:
            await server.http.get("/health", STATUS_LIMIT_S)
            await self._dialect.check(server.http)
        except (OSError, HttpError, ValueError) as error:
            await server.http.close()
            raise Died(
                f"no {self._dialect.name} server answers at engine.url={url}: {type(error).__name__}: {error}"
            ) from error
        except BaseException:
            await server.http.close()
            raise
        return server

    async def _started(self) -> _Server:
        """Raises Died when it ends before it answers, EngineError."""
        with boundary(EngineError, f"{self._who} could not be started"):
            process = self._launch(
                "sluice.engines.guard", path=self._path, folder=self._folder, log=self._log, variables={}
            )
        try:
            pipe = await asyncio.to_thread(process.connect)
            reader, writer = await asyncio.open_connection(sock=pipe)
        except BaseException as error:
            process.kill()
            raise start_failure(error, self._num_started, f"{self._who} could not be started", self._see) from error
        server: _Server | None = None
        over = asyncio.Event()

        def ended(_: Connection, cause: str) -> None:
            over.set()
            self._ended(server, cause)

        connection = Connection(process, reader, writer, _no_requests, ended)
        try:
            key = secrets.token_urlsafe(32)
            start = Start(self._dialect.command(key), str(self._publication.folder))
            server = _Server(await connection.ask(start, LAUNCH_LIMIT_S), self._num_started, key)
            server.connection, server.over = connection, over
            await self._ready(server)
        except BaseException as error:
            connection.end(f"it did not start: {error}")
            if server:
                await server.http.close()
            raise start_failure(error, self._num_started, f"{self._who} could not be started", self._see) from error
        server.watching = asyncio.create_task(self._watch(server, connection))
        return server

    async def _ready(self, server: _Server) -> None:
        try:
            async with asyncio.timeout(self._start_limit_s):
                while not server.over.is_set():
                    with suppress(OSError, HttpError, ValueError):
                        await server.http.get("/health", STATUS_LIMIT_S)
                        await self._dialect.check(server.http)
                        return
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise EngineError(f"it does not answer after {self._start_limit_s:g} s (engine.start_limit_s)") from None
        raise Died(server.cause or "it ended while it started")

    async def _watch(self, server: _Server, connection: Connection) -> None:
        """By ticks and not by the clock: while a step of the trainer holds up this event loop, answers lie unread."""
        silent, tick_s = 0, self._hang_timeout_s / TICKS
        while silent < TICKS:
            began = asyncio.get_running_loop().time()
            silent = 0 if await self._is_well(server, tick_s) else silent + 1
            await asyncio.sleep(max(0.0, began + tick_s - asyncio.get_running_loop().time()))
        connection.end(f"it gave no sign of life for {self._hang_timeout_s:g} s (engine.hang_timeout_s) and was killed")

    async def _is_well(self, server: _Server, limit_s: float) -> bool:
        try:
            await server.http.get("/health", limit_s)
        except (OSError, HttpError, ValueError):
            return False
        return True

    async def _is_over(self, server: _Server, cause: Exception) -> bool:
        """Whether a server whose answer broke off is dead, or as good as that."""
        if server.connection:
            with suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_LIMIT_S):
                    await server.over.wait()
        if not server.over.is_set() and not await self._is_well(server, STATUS_LIMIT_S):
            what = f"it answers no more ({type(cause).__name__}: {cause})"
            if server.connection:
                server.connection.end(what)
            else:
                server.over.set()
                self._ended(server, what)
        return server.over.is_set()

    def _ended(self, server: _Server | None, cause: str) -> None:
        if server:
            server.cause = cause
            server.closing = asyncio.create_task(server.http.close())
            if server.watching and server.watching is not asyncio.current_task():
                server.watching.cancel()
            if server is self._server:
                self._server = None
                self._may_begin.set()  # who waits is told
        if not self._closed:
            self._untold = self._loss(cause, self._num_started)

    def _loss(self, cause: str, number: int) -> EngineLostError:
        return EngineLostError(f"{cause}{self._see}", number)

    def _told_loss(self, cause: str, number: int) -> EngineLostError:
        """To be raised; nobody else has to be told of it."""
        if self._untold and self._untold.process == number:
            self._untold = None
        return self._loss(cause, number)

    def _untold_loss(self) -> EngineLostError | None:
        """To be raised, since it is told thereby."""
        loss, self._untold = self._untold, None
        return loss

    async def close(self) -> None:
        self._closed = True
        server, self._server = self._server, None
        self._may_begin.set()  # who waits is told
        if server:
            if server.connection:
                with suppress(Died):
                    await server.connection.ask(Stop(), 2 * STOP_LIMIT_S)
                server.connection.end("the engine was closed")
            self._ended(server, "the engine was closed")
            await server.http.close()
        self._publication.close()

    def belongs_to(self, folder: Path) -> None:
        """A run with this folder; what the server prints goes to a file there."""
        self._log = folder / f"{self._name}.log"
        self._publication.belongs_to(folder)
        self._link = self._publication.link(self._name)

    def status(self) -> str:
        """What it does at the moment, for people."""
        server = self._server
        if server is None:
            return (
                f"{self._who}, which is starting" if self._connecting.locked() else f"{self._who}, which does not run"
            )
        weights = f"weights of version {server.version}" if server.version >= 0 else "no weights yet"
        asleep = "; it is asleep" if server.is_asleep else ""
        return (
            f"the {self._dialect.name} server at {server.http.url}: {self._num_open} completions are asked for, {self._num_asked} of "
            f"which it has; {weights}{asleep}"
        )

    @property
    def _who(self) -> str:
        return f"the {self._dialect.name} server" + (f" at {self._url}" if self._url else "")

    @property
    def _see(self) -> str:
        return f"; see {self._log}" if self._log and self._log.exists() and self._log.stat().st_size else ""


def _no_requests(number: int, answer: Any) -> None:
    raise AssertionError(f"the guard answered a request {number} that nobody made: {answer!r}")
