"""The life of an inference server: it is found at an address, or started through a guard and looked at as long as it runs; and it ends."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from sluice.connection import TICKS, Connection
from sluice.engines.deaths import Deaths
from sluice.engines.dialect import POLL_S, STATUS_LIMIT_S, Dialect
from sluice.engines.guard import STOP_LIMIT_S, Start, Stop
from sluice.engines.http import KEY_VARIABLE, HttpClient, HttpError
from sluice.errors import EngineError, boundary
from sluice.processes import Child, Died, Launch, start_failure

LAUNCH_LIMIT_S = 60.0
"""For the guard to start the server's program, which then still has to load."""
LEAVE_LIMIT_S = 5.0
"""How long a server whose answer broke off may take to end, before it is held to be alive."""


class Server:
    """One, from its start to its end."""

    def __init__(self, dialect: Dialect, number: int, ended: Callable[[Server], None]) -> None:
        """`ended` is told once."""
        self.number = number
        """Which of its engine's servers it is."""
        self.version = -1
        """Of the weights that it has."""
        self.is_asleep = False
        self.is_paused = False
        """Weights are on their way into it, or broke off there."""
        self.cause = ""
        """Of its end."""
        self._dialect, self._tell_end = dialect, ended
        self._http: HttpClient | None = None
        self._guard: Connection | None = None
        """Where we have started it."""
        self._num_orders = 0
        """About its weights, under way: each may hold up what computes for long."""
        self._over = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @property
    def http(self) -> HttpClient:
        assert self._http, "it has no address yet"
        return self._http

    async def find(self, url: str, limit_s: float) -> None:
        """Raises EngineError when none answers there in time, or it cannot serve a run."""
        self._http = HttpClient(url, os.environ.get(KEY_VARIABLE))
        try:
            await self._ready(limit_s, f"no {self._dialect.name} server answers at engine.url={url}")
        except BaseException:
            await self._http.close()
            raise
        self.is_paused = True  # whoever published to it before may have left it so

    async def start(self, process: Child, folder: Path | None, limit_s: float) -> None:
        """Through the guard that `process` is. Raises Died when it ends before it answers, EngineError when it does not answer in time.
        Weights are published in `folder`, if in any."""
        try:
            pipe = await asyncio.to_thread(process.connect)
            reader, writer = await asyncio.open_connection(sock=pipe)
            self._guard = Connection(process, reader, writer, _no_requests, lambda _, cause: self.end(cause))
            key = secrets.token_urlsafe(32)
            url = await self._guard.ask(Start(self._dialect.command(key), folder), LAUNCH_LIMIT_S)
            self._http = HttpClient(url, key)
            await self._ready(limit_s, "it does not answer")
        except BaseException as error:
            self.end(f"it did not start: {error}") if self._guard else process.kill()
            if self._http:
                await self._http.close()
            raise

    async def _ready(self, limit_s: float, otherwise: str) -> None:
        said = ""
        try:
            async with asyncio.timeout(limit_s):
                while not self._over.is_set():
                    try:
                        await self._check()
                        return
                    except (OSError, HttpError, ValueError) as error:
                        if isinstance(error, HttpError) and error.status == 401:
                            raise EngineError(f"{self.http.url}: {error}") from None
                        said = f": {type(error).__name__}: {error}"
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise EngineError(f"{otherwise} after {limit_s:g} s (engine.start_limit_s){said}") from None
        raise Died(self.cause)

    async def _check(self) -> None:
        await self.http.get("/health", STATUS_LIMIT_S)
        await self._dialect.check(self.http)

    def watch(self, limit_s: float) -> None:
        """From now on, end it when it gives no sign of life for so long."""
        self._watching = asyncio.create_task(self._watch(limit_s))

    async def _watch(self, limit_s: float) -> None:
        """By ticks and not by the clock: while a step of the trainer holds up this event loop, answers lie unread."""
        silent, tick_s = 0, limit_s / TICKS
        while silent < TICKS:
            began = asyncio.get_running_loop().time()
            match await self._health(tick_s, deep=not self._num_orders and not self.is_asleep):
                case "well":
                    silent = 0
                case "silent":
                    silent += 1
                case "refused":  # it is shutting down, and may wait for ever for requests that it will not answer
                    self.end("it listens no more, and was killed")
                    return
            await asyncio.sleep(max(0.0, began + tick_s - asyncio.get_running_loop().time()))
        self.end(f"it gave no sign of life for {limit_s:g} s (engine.hang_timeout_s) and was killed")

    @contextmanager
    def ordered(self) -> Generator[None]:
        """Around one about its weights, which has a limit of its own."""
        self._num_orders += 1
        try:
            yield
        finally:
            self._num_orders -= 1

    async def _health(self, limit_s: float, *, deep: bool = False) -> Literal["well", "silent", "refused"]:
        """`deep`: of what computes in it too."""
        try:
            await (self._dialect.pass_through(self.http, limit_s) if deep else self.http.get("/health", limit_s))
        except ConnectionRefusedError:
            return "refused"
        except (OSError, HttpError, ValueError):
            return "silent"
        return "well"

    async def is_over(self, cause: Exception) -> bool:
        """Whether one whose answer broke off is dead, or as good as that."""
        if self._guard:
            with suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_LIMIT_S):
                    await self._over.wait()
        if not self._over.is_set() and await self._health(STATUS_LIMIT_S) != "well":
            self.end(f"it answers no more ({type(cause).__name__}: {cause})")
        return self._over.is_set()

    async def stop(self) -> None:
        """Let it end by itself, if we have started it; else let it go on, if a publication broke off."""
        if self._guard:
            with suppress(Died):
                await self._guard.ask(Stop(), 2 * STOP_LIMIT_S)
        elif self.is_paused:
            await _let_go_on(self._dialect, self.http)
        self.end("the engine was closed")
        await self.http.close()

    def end(self, cause: str) -> None:
        """Kill it, if we have started it and it has not ended."""
        if self._over.is_set():
            return
        self._over.set()
        self.cause = cause
        if self._watching and self._watching is not asyncio.current_task():
            self._watching.cancel()
        if self._guard:
            self._guard.end(cause)
        if self._http:
            self._closing = asyncio.create_task(self._http.close())
        self._tell_end(self)


class Servers:
    """Those of an engine, one after the other: at an address where they are, or started."""

    def __init__(
        self,
        dialect: Dialect,
        deaths: Deaths,
        *,
        url: str | None,
        launch: Launch,
        start_limit_s: float,
        hang_timeout_s: float,
    ) -> None:
        self.who = f"the {dialect.name} server" + (f" at {url}" if url else "")
        """In what people are told."""
        self._dialect, self._deaths, self._url, self._launch = dialect, deaths, url, launch
        self._start_limit_s, self._hang_timeout_s = start_limit_s, hang_timeout_s
        self._path, self._folder = list(sys.path), os.getcwd()  # a replacement finds what the first one found

    async def next(self, number: int, folder: Path | None, ended: Callable[[Server], None]) -> Server:
        """Raises Died when it ends before it answers, EngineError when it cannot be started, or is not there in time. Weights are
        published in `folder`; `ended` is told of its end."""
        server = Server(self._dialect, number, ended)
        if self._url:  # its owner may be starting it again
            await server.find(self._url, self._start_limit_s)
        else:
            await self._start(server, folder)
        return server

    async def let_go_on(self) -> None:
        """The one at the address, if there is one, which was lost in a publication."""
        if self._url:
            http = HttpClient(self._url, os.environ.get(KEY_VARIABLE))
            await _let_go_on(self._dialect, http)
            await http.close()

    @property
    def starting(self) -> str:
        """What `next` does, for people."""
        what = "which is looked for" if self._url else "which is starting"
        return f"{self.who}, {what}; that may take {self._start_limit_s:g} s (engine.start_limit_s)"

    async def _start(self, server: Server, folder: Path | None) -> None:
        failure = f"{self.who} could not be started"
        with boundary(EngineError, failure):
            guard = self._launch(
                "sluice.engines.guard", path=self._path, folder=self._folder, log=self._deaths.log, variables={}
            )
        try:
            await server.start(guard, folder, self._start_limit_s)
        except BaseException as error:
            raise start_failure(error, server.number, failure, self._deaths.see) from error
        server.watch(self._hang_timeout_s)


async def _let_go_on(dialect: Dialect, http: HttpClient) -> None:
    """With what it was asked before a publication broke off, if it hears of it."""
    with suppress(OSError, HttpError, ValueError):
        async with asyncio.timeout(STATUS_LIMIT_S):
            await dialect.resume(http)


def _no_requests(number: int, answer: Any) -> None:
    raise AssertionError(f"the guard answered a request {number} that nobody made: {answer!r}")
