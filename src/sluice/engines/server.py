"""An engine that is a server of its own, vLLM or SGLang: started and stopped by us, or there already at some address.

One that we started and that dies is started again with the weights that were published last, and asked again what it had not
answered. Completions that live through a publication know of each token which weights made it: from the server where it says so,
else because it gives back what it has at the publication, and the rest is asked for afterwards.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from sluice.connection import Connection, Died
from sluice.engines.guard import STOP_LIMIT_S, Launch, Stop
from sluice.engines.http import HttpClient, HttpError
from sluice.engines.sampling import check_ids, check_room
from sluice.errors import EngineError, SluiceError, boundary
from sluice.interfaces import Weights
from sluice.processes import Process
from sluice.types import Completion, FinishReason, Sampling
from sluice.weights.folders import PublishedFolders

LAUNCH_LIMIT_S = 60.0
"""For the guard to start the server's program, which then still has to load."""
PUBLISH_LIMIT_S = 600.0
"""For each request by which a server takes over weights."""
STATUS_LIMIT_S = 10.0
LEAVE_LIMIT_S = 5.0
"""How long a server whose answer broke off may take to end, before it is held to be alive."""
BROKEN_ANSWERS = 3
"""How often one request may go wrong at a server that is alive."""
POLL_S = 0.2

T = TypeVar("T")


@dataclass
class Reply:
    """What a server made of one request: as in a `Completion`."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    """`abort`: it gave back what it had, because weights are published."""
    policy_versions: list[int] | None = None
    """None: all by the weights that the server had when it was asked."""
    kept_ids: list[list[int]] = field(default_factory=list[list[int]])


class Dialect(Protocol):
    """What one kind of server wants said, and how it says what it did."""

    name: str

    def launch(self) -> Launch:
        """The command that starts one, with random weights."""
        ...

    async def check(self, http: HttpClient) -> None:
        """Raises EngineError for a server that cannot serve a run."""
        ...

    async def generate(self, http: HttpClient, prompt_ids: Sequence[int], sampling: Sampling) -> Reply: ...

    async def pause(self, http: HttpClient) -> None:
        """Returns when nothing is computed any more. What is unfinished is kept, or given back as it is."""
        ...

    async def load(self, http: HttpClient, folder: str, version: int) -> None:
        """Take over the weights of a folder; it is paused."""
        ...

    async def resume(self, http: HttpClient) -> None: ...

    async def fingerprint(self, http: HttpClient, folder: str) -> str:
        """Of its own weights, which should be those of the folder."""
        ...

    async def sleep(self, http: HttpClient) -> None:
        """Give back the device's memory, the weights' too: others are on their way."""
        ...

    async def wake(self, http: HttpClient, what: Literal["weights", "kv_cache"]) -> None:
        """Take the memory of these again."""
        ...


class _Server:
    """One that runs, from its start to its end."""

    def __init__(self, http: HttpClient, connection: Connection | None) -> None:
        self.http = http
        self.connection = connection
        self.version = -1
        """Of the weights that it has."""
        self.is_asleep = False
        self.over = asyncio.Event()


class ServerEngine:
    def __init__(
        self,
        dialect: Dialect,
        *,
        url: str | None,
        decode: Callable[[Sequence[int]], str],
        vocab_size: int,
        max_model_len: int,
        folders: PublishedFolders,
        finish_limit_s: float | None,
        start_limit_s: float,
        max_restarts: int,
        start: Callable[..., Process] = Process,
    ) -> None:
        """With a `url` the server is there, and is never started; without one it is started through `start`, when weights are
        published for the first time. `decode` turns ids into text, for stop strings only.

        `finish_limit_s`: completions that were begun end with the weights that they began with, for which a publication waits so
        long at most; None: they go on with the new ones.
        """
        self.version = 0
        self.log: Path | None = None
        """File for what the server prints; it is told before there is one."""
        self.tell: Callable[[str, str], None] = lambda kind, text: None
        """Takes kind and text of an event."""
        self._dialect, self._url, self._start = dialect, url, start
        self._decode, self._vocab_size, self._max_model_len = decode, vocab_size, max_model_len
        self._folders = folders
        self._finish_limit_s, self._start_limit_s = finish_limit_s, start_limit_s
        self._max_restarts = self._restarts_left = max_restarts
        self._path, self._folder = list(sys.path), os.getcwd()
        self._server: _Server | None = None
        self._connecting = asyncio.Lock()
        self._may_begin = asyncio.Event()
        """Not while weights change."""
        self._num_open = self._num_asked = 0
        self._none_asked = asyncio.Event()
        self._none_asked.set()
        self._closed = False

    # -- generation --

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Raises PromptTooLongError when prompt and completion do not fit the window, EngineError when the server refuses, cannot be
        reached, or has died more often than it may. Cancelling the call aborts it at the server."""
        check_room(prompt_ids, sampling, self._max_model_len)
        check_ids(prompt_ids, self._vocab_size)
        self._num_open += 1
        try:
            return await self._whole(prompt_ids, sampling)
        finally:
            self._num_open -= 1

    async def _whole(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """In as many requests as publications come in between."""
        done = Completion([], [], "abort", [], sampling.temperature)
        last, given_up = -1, 0
        while done.finish_reason == "abort":
            reply, version = await self._reply(prompt_ids, sampling, done)
            self._extend(done, reply, version, sampling)
            given_up = given_up + 1 if version == last else 0
            if given_up == BROKEN_ANSWERS:
                raise EngineError(f"{self._name} gave up a completion {given_up} times without new weights{self._see}")
            last = version
        if not any(done.kept_ids):
            done.kept_ids = []
        return done

    async def _reply(self, prompt_ids: Sequence[int], sampling: Sampling, done: Completion) -> tuple[Reply, int]:
        """To the prompt and what is done of the completion, and the version that the server had when it was asked."""
        num_done = len(done.token_ids)
        rest = replace(
            sampling,
            max_new_tokens=sampling.max_new_tokens - num_done,
            seed=sampling.seed + num_done,  # what comes is not drawn as what came
        )
        broken = 0
        while True:
            await self._may_begin.wait()
            try:
                server = await self._connected()
            except Died:
                continue  # as often as it may be started again
            if not self._may_begin.is_set() or self._server is not server:
                continue
            version = server.version
            with self._asked():
                try:
                    return await self._dialect.generate(server.http, [*prompt_ids, *done.token_ids], rest), version
                except HttpError as error:
                    if error.status < 500:
                        raise EngineError(f"{self._name} refuses a completion: {error}{self._see}") from error
                    cause: Exception = error
                except OSError as error:
                    cause = error
            broken += 1
            await self._seen_to(server, cause, last=broken == BROKEN_ANSWERS)

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

    async def _seen_to(self, server: _Server, cause: Exception, last: bool) -> None:
        """Returns when the request may be sent again. Raises EngineError when that has no sense."""
        if server.connection and await self._ends(server):
            return  # it is started again as long as it may be
        if last:
            raise EngineError(f"{self._name} failed {BROKEN_ANSWERS} times in a row: {cause}{self._see}") from cause
        await asyncio.sleep(POLL_S)

    async def _is_well(self, server: _Server) -> bool:
        try:
            await server.http.get("/health", STATUS_LIMIT_S)
        except (OSError, HttpError, ValueError):
            return False
        return True

    def _extend(self, done: Completion, reply: Reply, version: int, sampling: Sampling) -> None:
        joint = len(done.token_ids)
        count = len(reply.token_ids)
        end = joint + count
        done.token_ids += reply.token_ids
        done.logprobs += reply.logprobs
        done.policy_versions += reply.policy_versions or [version] * count
        done.kept_ids += reply.kept_ids or [[]] * count
        done.finish_reason = reply.finish_reason
        if sampling.stop:
            end = self._stopped_at(done.token_ids, sampling, joint, reply.finish_reason)
        if end < joint + count or (reply.finish_reason == "abort" and end == sampling.max_new_tokens):
            done.finish_reason = "stop" if end < joint + count else "length"
        for column in (done.token_ids, done.logprobs, done.policy_versions, done.kept_ids):
            del column[end:]

    def _stopped_at(self, token_ids: list[int], sampling: Sampling, joint: int, reason: FinishReason) -> int:
        """How many tokens complete the first stop string that ends behind the joint, or all of them.

        A server does not see one that began before the tokens it was asked for, and where it draws several tokens at once it may
        give some behind the end.
        """
        reach = max(len(text.encode()) for text in sampling.stop) + 4  # tokens that may hold one: see EmbeddedEngine
        first = joint if joint else max(0, len(token_ids) - 2 * reach if reason == "stop" else len(token_ids))
        for end in range(first + 1, len(token_ids) + 1):
            text = self._decode(token_ids[max(0, end - reach) : end])
            if any(stop in text for stop in sampling.stop):
                return end
        return len(token_ids)

    # -- weights --

    async def update_weights(self, weights: Weights, version: int) -> None:
        """Raises EngineError when the server does not take them, or has died more often than it may."""
        with boundary(EngineError, "the weights could not be written for the server"):
            await self._folders.add(weights.save, version)
        self.version = version
        self._may_begin.clear()
        try:
            if self._finish_limit_s is not None:
                await self._finished(self._finish_limit_s)
            await self._persistently(self._publish)
        finally:
            self._may_begin.set()
        self._folders.keep_newest()

    async def _finished(self, limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await self._none_asked.wait()
        except TimeoutError:
            raise EngineError(
                f"{self._num_asked} completions did not end within {limit_s:g} s (rollout.timeout_s), and engine.on_new_weights=finish "
                "lets no weights be published before"
            ) from None

    async def _publish(self, server: _Server) -> None:
        if server.version != self.version:
            await self._load(server)

    async def _load(self, server: _Server) -> None:
        """What is published, with nothing computed meanwhile."""
        dialect, http = self._dialect, server.http
        await (dialect.wake(http, "weights") if server.is_asleep else dialect.pause(http))
        await dialect.load(http, str(self._folders.newest), self.version)
        if server.is_asleep:
            await dialect.wake(http, "kv_cache")
        await dialect.resume(http)
        server.is_asleep, server.version = False, self.version

    async def fingerprint(self) -> str | None:
        folder = str(self._folders.newest)
        return await self._persistently(lambda server: self._dialect.fingerprint(server.http, folder))

    async def sleep(self) -> None:
        """Give the device's memory to the trainer, until weights are published; what is asked for meanwhile waits."""
        self._may_begin.clear()
        await self._persistently(self._put_to_sleep)

    async def _put_to_sleep(self, server: _Server) -> None:
        if not server.is_asleep:
            await self._dialect.sleep(server.http)
            server.is_asleep = True

    # -- the server --

    async def _persistently(self, ask: Callable[[_Server], Awaitable[T]]) -> T:
        """Of the next server too when one dies. Raises EngineError when one that is alive refuses."""
        for _ in range(self._restarts_left + 2):
            try:
                server = await self._connected()
            except Died:
                continue
            try:
                return await ask(server)
            except (HttpError, OSError, ValueError) as error:
                refused = isinstance(error, HttpError) and error.status < 500
                if server.connection is None or refused or not await self._ends(server):
                    raise EngineError(f"{self._name}: {type(error).__name__}: {error}{self._see}") from error
        raise self._died_too_often()

    async def _ends(self, server: _Server) -> bool:
        """Whether it is dying, now that an answer broke off."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_LIMIT_S):
                await server.over.wait()
        if not server.over.is_set() and server.connection and not await self._is_well(server):
            server.connection.end("it answers no more")
        return server.over.is_set()

    async def _connected(self) -> _Server:
        """Starts one if there is none. Raises EngineError when that cannot be done, or was done too often."""
        async with self._connecting:
            if self._closed:
                raise EngineError("the engine is closed")
            if self._server:
                return self._server
            if self._restarts_left < 0:
                raise self._died_too_often()
            server = await (self._found() if self._url else self._started())
            self._server = server
            return server

    async def _found(self) -> _Server:
        assert self._url
        server = _Server(HttpClient(self._url), None)
        try:
            await server.http.get("/health", STATUS_LIMIT_S)
            await self._dialect.check(server.http)
        except EngineError:
            server.http.close()
            raise
        except (OSError, HttpError) as error:
            server.http.close()
            raise EngineError(
                f"no {self._dialect.name} server answers at engine.url={self._url}: {type(error).__name__}: {error}"
            ) from error
        return server

    async def _started(self) -> _Server:
        with boundary(EngineError, f"{self._name} could not be started"):
            process = self._start(
                "sluice.engines.guard", path=self._path, folder=self._folder, log=self.log, variables={}
            )
        try:
            reader, writer = await asyncio.open_connection(sock=process.socket)
        except BaseException:
            process.kill()
            raise
        over = asyncio.Event()
        http: HttpClient | None = None
        connection = Connection(
            process, reader, writer, _no_requests, lambda ended, cause: self._ended(ended, cause, over)
        )
        try:
            port = await connection.ask(self._dialect.launch(), LAUNCH_LIMIT_S)
            http = HttpClient(f"http://127.0.0.1:{port}")
            server = _Server(http, connection)
            server.over = over
            await self._ready(server)
            if self._folders.newest:
                await self._load(server)
        except BaseException as error:
            connection.end(f"it did not start: {error}")
            if http:
                http.close()
            if isinstance(error, Died):
                raise
            if isinstance(error, (SluiceError, HttpError, OSError)):
                raise EngineError(f"{self._name} could not be started: {error}{self._see}") from error
            raise
        return server

    async def _ready(self, server: _Server) -> None:
        """Wait until it answers. Raises Died when it ends before."""
        try:
            async with asyncio.timeout(self._start_limit_s):
                while not server.over.is_set():
                    with suppress(OSError, HttpError):
                        await server.http.get("/health", STATUS_LIMIT_S)
                        await self._dialect.check(server.http)
                        return
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise EngineError(f"it does not answer after {self._start_limit_s:g} s (engine.start_limit_s)") from None
        raise Died("it ended while it started")

    def _ended(self, connection: Connection, cause: str, over: asyncio.Event) -> None:
        over.set()
        if self._server and self._server.connection is connection:
            self._server.http.close()
            self._server = None
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
            f"{self._name}: {cause}{self._see}; {self._num_open} completions were asked for; {left} (engine.max_restarts)",
        )

    def _died_too_often(self) -> EngineError:
        times = "once" if self._max_restarts == 0 else f"{self._max_restarts + 1} times"
        return EngineError(f"{self._name} died {times} (limit: engine.max_restarts){self._see}")

    async def close(self) -> None:
        self._closed = True
        self._may_begin.set()  # who waits is told
        server, self._server = self._server, None
        if server:
            if server.connection:
                with suppress(Died):
                    await server.connection.ask(Stop(), 2 * STOP_LIMIT_S)
                server.connection.end("the engine was closed")
            server.http.close()
        self._folders.close()

    def status(self) -> str:
        """What it does at the moment, for people."""
        absent = "it is starting" if self._connecting.locked() else "it does not run"
        where = self._server.http.url if self._server else absent
        return (
            f"{self._name}, {where}: {self._num_open} completions are asked for, {self._num_asked} of which it has; "
            f"weights of version {self.version}"
        )

    @property
    def _name(self) -> str:
        return f"the {self._dialect.name} server" + (f" at {self._url}" if self._url else "")

    @property
    def _see(self) -> str:
        return f"; see {self.log}" if self.log and not self._url else ""


def _no_requests(number: int, answer: Any) -> None:
    raise AssertionError(f"the guard answered a request {number} that nobody made: {answer!r}")
