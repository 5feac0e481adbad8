"""An engine that is a server of its own, vLLM or SGLang: started and stopped by us, or there already at some address.

One that dies fails what it was asked (EngineLostError); when it is given weights, or asked for their fingerprint, it is started again,
with the weights that were published last. What is then asked again, and how often that may happen, is the router's to say.

Completions that live through a publication know of each token which weights made it: from the server where it says so, else because it gives
back what it has at the publication, and the rest is asked for afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sluice.engines.deaths import Deaths
from sluice.engines.dialect import POLL_S, Dialect, Reply
from sluice.engines.http import HttpError
from sluice.engines.lifetime import Server, Servers
from sluice.engines.pieces import Decode, extend
from sluice.engines.sampling import check_ids, check_room
from sluice.errors import EngineError, EngineLostError
from sluice.interfaces import Weights
from sluice.processes import Died, Launch
from sluice.types import Completion, Sampling
from sluice.weights.broadcast import Broadcast, BroadcastLink
from sluice.weights.disk import Disk, DiskLink

BROKEN_ANSWERS = 3
"""How often one request may go wrong at a server that is alive."""


class ServerEngine:
    def __init__(
        self,
        dialect: Dialect,
        publication: Disk | Broadcast,
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
        self._dialect, self._publication, self._name = dialect, publication, name
        self._decode, self._vocab_size, self._max_model_len = decode, vocab_size, max_model_len
        self._finish_limit_s = finish_limit_s
        self._deaths = Deaths()
        self._servers = Servers(
            dialect, self._deaths, url=url, launch=launch, start_limit_s=start_limit_s, hang_timeout_s=hang_timeout_s
        )
        self._server: Server | None = None
        self._left_paused = False
        """The last one was, when it was lost."""
        self._link: DiskLink | BroadcastLink[Any]
        """With the server that runs."""
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
                raise EngineError(
                    f"{self._servers.who} gave up a completion {given_up} times without new weights{self._deaths.see}"
                )
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
                raise self._deaths.last("it does not run")
            version = server.version
            try:
                with self._asked():
                    return await self._dialect.generate(server.http, [*prompt_ids, *done.token_ids], rest), version
            except HttpError as error:
                if error.status < 500:
                    raise EngineError(f"{self._servers.who} refuses a completion: {error}{self._deaths.see}") from error
                cause: Exception = error
            except OSError as error:
                cause = error
            if await server.is_over(cause):
                raise self._deaths.told(server.cause, server.number) from cause
            if broken == BROKEN_ANSWERS:
                raise EngineError(
                    f"{self._servers.who} failed {broken} times in a row: {cause}{self._deaths.see}"
                ) from cause
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
        return {seed: _copied(c) for seed, c in self._begun.items()}

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
        async with self._telling(server):
            with server.ordered():
                return await self._dialect.fingerprint(
                    server.http, lambda: self._publication.fingerprint(server.version)
                )

    async def _deliver(self, server: Server) -> None:
        """The weights that were published last; and again, if others were while it took them over."""

        async def take_over() -> None:
            assert self._publication.version is not None
            await self._load(server, self._publication.version)

        async with self._delivering:
            while (version := self._publication.version) not in (None, server.version):
                async with self._telling(server):
                    await self._link.deliver(version, take_over)

    async def _load(self, server: Server, version: int) -> None:
        dialect, http = self._dialect, server.http
        self._may_begin.clear()
        try:
            if self._finish_limit_s is not None:
                await self._finished(self._finish_limit_s)
            with server.ordered():
                server.is_paused = True
                await (dialect.wake(http, "weights") if server.is_asleep else dialect.pause(http))
                await dialect.load(http, self._link.inlet, version)
                if server.is_asleep:
                    await dialect.wake(http, "kv_cache")
                await dialect.resume(http)
            server.is_asleep = server.is_paused = False
            server.version = version
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
                with server.ordered():
                    await self._dialect.sleep(server.http)
                server.is_asleep = True
        except EngineLostError:  # of no matter to the trainer, which has the memory now
            self._deaths.keep(server.cause, server.number)

    # -- the server --

    @asynccontextmanager
    async def _telling(self, server: Server) -> AsyncGenerator[None]:
        """Around requests: what goes wrong with them is that the server is lost (EngineLostError), or refuses (EngineError)."""
        try:
            yield
        except (HttpError, OSError, ValueError) as error:
            if isinstance(error, TimeoutError):  # what answers /health need not be what computes
                server.end(f"it did not carry out an order about its weights in time ({error}), and was given up")
            refused = isinstance(error, HttpError) and error.status < 500
            if not refused and await server.is_over(error):
                raise self._deaths.told(server.cause, server.number) from error
            raise EngineError(f"{self._servers.who}: {type(error).__name__}: {error}{self._deaths.see}") from error

    async def _connected(self) -> Server:
        """Starts one if there is none. Raises EngineError when that cannot be done."""
        async with self._connecting:
            if self._server is None:
                if self._closed:
                    raise EngineError("the engine is closed")
                number = self._deaths.count_start()
                self._may_begin.clear()  # it has no weights yet
                try:
                    server = await self._servers.next(number, self._publication.folder, self._ended)
                    try:
                        self._link = self._dialect.link(self._publication, self._name)
                    except BaseException:
                        await server.stop()
                        raise
                    self._server = server
                except BaseException as error:
                    self._may_begin.set()  # who waits is told
                    if isinstance(error, Died):
                        raise self._deaths.told(str(error), number) from None
                    raise
            return self._server

    def _ended(self, server: Server) -> None:
        if server is self._server:
            self._server = None
            self._left_paused = server.is_paused
            self._may_begin.set()  # who waits is told
        if not self._closed:
            self._deaths.keep(server.cause, server.number)

    async def close(self) -> None:
        self._closed = True
        server, self._server = self._server, None
        self._may_begin.set()  # who waits is told
        if server:
            await server.stop()
        elif self._left_paused:
            await self._servers.let_go_on()
        self._publication.close()

    def belongs_to(self, folder: Path) -> None:
        """A run with this folder; what the server prints goes to a file there."""
        self._deaths.log = folder / f"{self._name}.log"
        self._publication.belongs_to(folder)

    def status(self) -> str:
        """What it does at the moment, for people."""
        server = self._server
        if server is None:
            return self._servers.starting if self._connecting.locked() else f"{self._servers.who}, which does not run"
        weights = f"weights of version {server.version}" if server.version >= 0 else "no weights yet"
        asleep = "; it is asleep" if server.is_asleep else ""
        return (
            f"the {self._dialect.name} server at {server.http.url}: {self._num_open} completions are asked for, {self._num_asked} of "
            f"which it has; {weights}{asleep}"
        )


def _copied(begun: Completion) -> Completion:
    """With lists of its own, since it grows."""
    return replace(
        begun,
        token_ids=list(begun.token_ids),
        logprobs=list(begun.logprobs),
        policy_versions=list(begun.policy_versions),
        kept_ids=list(begun.kept_ids) if any(begun.kept_ids) else [],
        routed_experts=list(begun.routed_experts),
        finish_reason="abort",
    )
