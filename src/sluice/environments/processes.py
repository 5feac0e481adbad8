"""An environment that is played in other processes. Whoever calls it sees no difference: the policy, and with it the seeds, stays here.

A process plays many attempts side by side. When it dies, those are played again elsewhere, from the beginning, and what the policy has
said already it says again.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from sluice.connection import TICKS, Answer, Connection
from sluice.environments.serving import Ask, Begin, Cancel, Drop, Ended, Finish, Play, Reply, sendable
from sluice.errors import EnvironmentError_, SluiceError, first_error
from sluice.interfaces import Policy
from sluice.processes import ONE_THREAD, Died, Launch, Process
from sluice.types import Prompt, Trajectory, Turn

TRIES = 3
"""Of an attempt whose process dies: once and once more that may be the machine's doing, or another attempt's."""
START_LIMIT_S = 120.0
"""For importing the user's module."""
START_TRIES = 3
"""Of a process that dies while it starts."""
LEAVE_LIMIT_S = 10.0
"""For an attempt to end when it is cancelled."""
FINISH_LIMIT_S = 5.0
"""For a process to end by itself, and tidy up; then it is killed."""


class RepeatingPolicy(Policy, Protocol):
    """One that an attempt can be played again with."""

    def begin_again(self) -> None:
        """As if nothing had been asked yet; what is asked as before is answered as before."""
        ...


class EnvironmentProcesses:
    """The environment at `module:function`, played in `num_workers` processes.

    What it prints goes to the file `log`, or nowhere; `launch` says of each worker how its processes are started; `tell` takes kind and
    text of an event.
    """

    def __init__(
        self,
        environment: str,
        num_workers: int,
        log: Path | None = None,
        launch: Callable[[int], Launch] = lambda index: Process,
        tell: Callable[[str, str], None] = lambda kind, message: None,
    ) -> None:
        self._workers = [_Worker(environment, log, launch(index), tell) for index in range(num_workers)]

    async def start(self) -> None:
        """Start all processes. Raises EnvironmentError_ when one cannot, with what it said."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for worker in self._workers:
                    tasks.create_task(worker.connected())
        except BaseExceptionGroup as errors:
            starting = [worker.starting for worker in self._workers if worker.starting]
            await self.close()
            await asyncio.gather(*starting, return_exceptions=True)
            raise first_error(errors) from None

    async def __call__(self, prompt: Prompt, policy: RepeatingPolicy) -> Trajectory:
        """Raises what `play` would raise here, and EnvironmentError_ too when its process dies in every try, or none can be started."""
        num_died = 0
        while True:  # until one of so many tries ends it, or no worker is left
            worker = self._least_busy()
            try:
                return await worker.play(prompt, policy, is_last_try=num_died == TRIES - 1)
            except _GaveUp:
                pass
            except Died as death:
                num_died += 1
                if num_died == TRIES:
                    what = f"rollout.environment, on prompt {prompt.id}: {death}, {TRIES} times"
                    raise EnvironmentError_(what) from None
            policy.begin_again()

    def _least_busy(self) -> _Worker:
        """Raises EnvironmentError_ when none of them can be started any more."""
        able = [worker for worker in self._workers if worker.failure is None]
        if not able:
            raise EnvironmentError_(str(self._workers[-1].failure))
        return min(able, key=lambda worker: worker.num_attempts)

    def status(self) -> str:
        """What each process does at the moment, for people."""
        return "\n".join(worker.status() for worker in self._workers)

    async def close(self) -> None:
        """End all processes, with all that they started; none is started again."""
        await asyncio.gather(*(worker.close() for worker in self._workers))


class _GaveUp(Exception):
    """A worker whose process cannot be started again."""


class _Attempt:
    """One that is played in the process: what it asks of its policy is asked here."""

    def __init__(self, number: int, policy: Policy, connection: Connection) -> None:
        self.end: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.calls: dict[int, asyncio.Task[None]] = {}
        self._number, self._policy, self._connection = number, policy, connection

    def take(self, message: Ask | Drop | Ended) -> None:
        match message:
            case Ask(call, messages):
                self.calls[call] = asyncio.create_task(self._respond(call, messages))
                self.calls[call].add_done_callback(lambda _: self.calls.pop(call))
            case Drop(call):
                if task := self.calls.get(call):
                    task.cancel()
            case Ended(result):
                if not self.end.done():
                    self.end.set_result(result)

    async def _respond(self, call: int, messages: bytes) -> None:
        answer = error = None
        try:
            message = await self._policy.respond(_loaded(messages, "what it said to the policy"))
            answer = _without_experts(self._policy.turns[-1]), message
        except Exception as raised:
            error = sendable(raised)
        self._connection.send(Reply(self._number, call, answer, error))

    async def forget_calls(self) -> None:
        """Which nobody waits for any more."""
        calls = [*self.calls.values()]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


class _Worker:
    """One process after the other."""

    def __init__(self, environment: str, log: Path | None, launch: Launch, tell: Callable[[str, str], None]) -> None:
        self.num_attempts = 0
        """That are played here, or wait for it."""
        self._environment, self._log, self._launch, self._tell = environment, log, launch, tell
        self._path, self._folder = list(sys.path), os.getcwd()  # a replacement finds what the first one found
        self._connection: Connection | None = None
        self.starting: asyncio.Task[Connection] | None = None
        self.failure: EnvironmentError_ | None = None
        """Why no process can be started any more; then it is used no more."""
        self._last_try = asyncio.Lock()
        """One at a time: of attempts with which two processes have died, the one that is to blame spoils no other's last try."""
        self._numbers = count()
        self._attempts: dict[int, _Attempt] = {}
        self._leaving: dict[int, asyncio.TimerHandle] = {}
        """By the numbers of attempts that were cancelled and have not ended: what happens if they do not."""
        self._heard = time.monotonic()

    async def play(self, prompt: Prompt, policy: Policy, is_last_try: bool) -> Trajectory:
        """Raises Died when the process does before the attempt ends, and _GaveUp when there is none any more."""
        self.num_attempts += 1
        try:
            async with self._last_try if is_last_try else nullcontext():
                trajectory, turns, error = _loaded(await self._played(prompt, policy), "what it returned")
        finally:
            self.num_attempts -= 1
        for returned in (turns, getattr(trajectory, "turns", None)):
            _give_back_experts(policy.turns, returned)
        if turns is not None:  # which the environment may have given rewards
            policy.turns = turns
        if error:
            raise error
        return trajectory

    async def _played(self, prompt: Prompt, policy: Policy) -> bytes:
        try:
            connection = await self.connected()
        except EnvironmentError_:
            raise _GaveUp from None
        number = next(self._numbers)
        attempt = self._attempts[number] = _Attempt(number, policy, connection)
        try:
            connection.send(Play(number, prompt))
            return await attempt.end
        finally:
            del self._attempts[number]
            if attempt.end.cancelled():
                connection.send(Cancel(number))
                self._see_it_end(number, connection, TICKS)
            await attempt.forget_calls()

    def _see_it_end(self, number: int, connection: Connection, ticks_left: int) -> None:
        """Not by the clock: while a step of the trainer holds up this event loop, answers lie unread."""
        if ticks_left:
            look = asyncio.get_running_loop().call_later
            self._leaving[number] = look(LEAVE_LIMIT_S / TICKS, self._see_it_end, number, connection, ticks_left - 1)
        else:
            del self._leaving[number]
            what = f"an attempt that was cancelled did not end within {LEAVE_LIMIT_S:g} s"
            connection.end(f"{what}, and its process was killed")

    def status(self) -> str:
        connection, attempts = self._connection, [*self._attempts.values()]
        if connection is None:
            return "a process that is starting" if self.starting else "no process"
        num_asking = sum(bool(attempt.calls) for attempt in attempts)
        return (
            f"{connection.process}: {len(attempts)} attempts, {num_asking} of them wait for the policy; "
            f"last heard of {time.monotonic() - self._heard:.1f} s ago"
        )

    async def close(self) -> None:
        self.failure = EnvironmentError_("the environment was closed")
        if self.starting:
            self.starting.cancel()
        if connection := self._connection:
            with suppress(Died):  # which is its answer
                await connection.ask(Finish(), FINISH_LIMIT_S)

    # -- the process --

    async def connected(self) -> Connection:
        """With a process that has imported the environment; starts one if there is none. Raises EnvironmentError_ when that cannot be."""
        if self.failure:
            raise EnvironmentError_(str(self.failure))
        if self._connection:
            return self._connection
        if self.starting is None:  # for all that wait for it, and longer than one that is cancelled
            self.starting = asyncio.create_task(self._start())
            self.starting.add_done_callback(lambda task: task.cancelled() or task.exception())  # if none waits any more
        return await asyncio.shield(self.starting)

    async def _start(self) -> Connection:
        try:
            for tries_left in reversed(range(START_TRIES)):
                try:
                    self._connection = await self._started()
                    return self._connection
                except (SluiceError, OSError) as error:
                    if not (isinstance(error, Died) and tries_left):
                        see = f"; see {self._log}" if self._log else ""
                        self.failure = EnvironmentError_(f"an environment process could not start: {error}{see}")
                        self._tell("environment_died", f"{self.failure}; it is given up")
                        raise self.failure from None
            raise AssertionError("the last try returns or raises")
        finally:
            self.starting = None

    async def _started(self) -> Connection:
        process = self._launch(
            "sluice.environments.serving", path=self._path, folder=self._folder, log=self._log, variables=ONE_THREAD
        )
        connection = None
        try:
            pipe = await asyncio.to_thread(process.connect)
            connection = Connection(process, *await asyncio.open_connection(sock=pipe), self._take, self._ended)
            await connection.ask(Begin(self._environment), START_LIMIT_S)
        except BaseException as error:
            connection.end(f"it did not start: {error}") if connection else process.kill()
            raise
        return connection

    def _take(self, number: int, answer: Answer) -> None:
        self._heard = time.monotonic()
        if attempt := self._attempts.get(number):
            attempt.take(answer.value)
        elif isinstance(answer.value, Ended) and (leaving := self._leaving.pop(number, None)):
            leaving.cancel()

    def _ended(self, connection: Connection, cause: str) -> None:
        if self._connection is not connection:  # it has never been there
            return
        self._connection = None
        for leaving in self._leaving.values():
            leaving.cancel()
        self._leaving.clear()
        lost = [attempt for attempt in self._attempts.values() if not attempt.end.done()]
        for attempt in lost:
            attempt.end.set_exception(Died(cause))
        if self.failure is None:
            self._tell(
                "environment_died", f"{connection.process}: {cause}; attempts that were played there: {len(lost)}"
            )


def _without_experts(turn: Turn) -> Turn:
    """No environment needs them, and each turn has those of the whole conversation."""
    return (
        replace(turn, completion=replace(turn.completion, routed_experts=[]))
        if turn.completion.routed_experts
        else turn
    )


def _give_back_experts(played: Sequence[Turn], returned: Any) -> None:
    """To the copies that an environment's process made of turns."""
    experts = {_ids(turn): turn.completion.routed_experts for turn in played if turn.completion.routed_experts}
    with suppress(AttributeError, TypeError):  # an environment may return anything
        for turn in returned if experts else []:
            turn.completion.routed_experts = experts.get(_ids(turn), [])


def _ids(turn: Turn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(turn.prompt_ids), tuple(turn.completion.token_ids)


def _loaded(pickled: bytes, what: str) -> Any:
    """By which code of the user's may run: what it raises is an error of the attempt."""
    try:
        return pickle.loads(pickled)
    except (Exception, SystemExit) as error:
        cannot = f"{what} cannot be read in the process of the run (rollout.environment_workers)"
        raise EnvironmentError_(f"{cannot}: {type(error).__name__}: {error}") from error
