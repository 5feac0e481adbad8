"""Several engines as one: who gets which request, and what becomes of it when an engine dies.

An engine that is lost (EngineLostError) is out of rotation at once, and what it had not answered is asked of another one: what a request
draws depends on its seed only, so no sample is lost. It is back in rotation when it gives, by its own reading, the fingerprint that the others
gave at the last publication. One that is lost too often is given up, and the run ends when none is left.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sluice.errors import EngineError, EngineGoneError, EngineLostError, TrainingError, first_error
from sluice.interfaces import Engine, Weights
from sluice.tracking.metrics import Metrics, Sum
from sluice.types import Completion, Sampling
from sluice.weights.publication import WeightsMoved

LONGEST_PAUSE_S = 30.0
"""Between two tries to have a lost engine back."""
REMEMBERED = 2**16
"""Groups and attempts of which it is known who computed them last."""

State = Literal["up", "away", "stale", "gone"]
"""In rotation; lost, and expected back; there, but not known to have the present weights; given up."""


@dataclass(eq=False)
class Replica:
    name: str
    """As people read it: `engine 1`, or `the engine` where there is one."""
    engine: Engine
    state: State = "up"
    version: int | None = None
    """Of the weights that it was given last."""
    fingerprint: str | None = None
    """What it said after that."""
    is_updating: bool = False
    is_promised: bool = False
    """It has no weights, and gets the next ones: the trainer is at them already."""
    num_open: int = 0
    """Requests that it has not answered."""
    num_requests: int = 0
    """That it answered since they were counted last."""
    num_lost: int = 0
    """Times in the run."""
    last_lost: int = 0
    """Which of its processes was lost last: several may hear of its death, and it counts once."""
    why: str = ""
    """What was wrong with it last."""
    returning: asyncio.Task[None] | None = None

    @property
    def may_return(self) -> bool:
        """Without more samples."""
        return self.state == "away" or self.is_promised


class Router:
    def __init__(self, engines: Sequence[Engine], *, synchronous: bool, max_restarts: int, group_size: int) -> None:
        """`synchronous`: who gets a request depends on its group only, and never on timing. Otherwise the least loaded one does, but
        what shares a prompt stays where it is computed, as long as that one has less than `group_size` requests more than another.

        `max_restarts`: times that each of them may be lost and come back.
        """
        self.tell: Callable[[str, str], None] = lambda kind, text: None
        """Takes kind and text of an event."""
        self.engines: Sequence[Any] = engines
        """Of whatever class they are."""
        names = [f"engine {k}" for k in range(len(engines))] if len(engines) > 1 else ["the engine"]
        self._replicas = [Replica(name, engine) for name, engine in zip(names, engines, strict=True)]
        self._synchronous = synchronous
        self._max_restarts = max_restarts
        self._group_size = group_size
        self._places: OrderedDict[tuple[int, ...], Replica] = OrderedDict()
        """Who was asked last for a group, (ticket,), and for an attempt, (ticket, index)."""
        self._version = 0
        self._agreed: str | None = None
        """The fingerprint that all gave at the last publication; None if they did not agree, or have none."""
        self._is_publishing = False
        self._num_bytes = 0
        """That the last publication moved."""
        self._changed = asyncio.Condition()
        self._num_resent = self._num_lost = 0
        self._closed = False

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """As the engines do. Raises EngineGoneError when none is left."""
        while True:  # each turn but the last one costs an engine one of its `max_restarts`
            replica = await self._chosen(sampling.session)
            replica.num_open += 1
            try:
                completion = await replica.engine.generate(prompt_ids, sampling)
            except EngineLostError as error:
                self._eject(replica, error)
                self._num_resent += 1
            else:
                replica.num_requests += 1
                return completion
            finally:
                replica.num_open -= 1

    async def update_weights(self, weights: Weights, version: int) -> int:
        """Returns when all that are in rotation have the weights; no other comes into rotation before it has them, too.

        All at once: a publication takes as long as with one engine. While one waits for completions to end with the weights that they
        began with, new requests go to others. Waits for lost ones only if synchronous, so that they all get the next requests, or if
        there are no others. Raises EngineGoneError when none is left, EngineError when one cannot take the weights.
        """
        self._version, self._agreed, self._is_publishing, self._num_bytes = version, None, True, 0
        try:
            while True:
                if behind := [r for r in self._having("up", "stale") if r.version != version]:
                    await _all([self._publish(replica, weights, version) for replica in behind])
                    continue
                away = [r.returning for r in self._having("away") if r.returning]
                if not away or (self._having("up") and not self._synchronous):
                    break
                await asyncio.wait(away, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._is_publishing = False
        if not (up := self._having("up")):
            raise self._none_left()
        said = {replica.fingerprint for replica in up}
        self._agreed = said.pop() if len(said) == 1 else None
        await self._admit()
        return self._num_bytes

    async def unfinished(self) -> dict[int, Completion]:
        """Of all of them."""
        parts = await asyncio.gather(*(replica.engine.unfinished() for replica in self._having("up")))
        return {seed: completion for part in parts for seed, completion in part.items()}

    async def fingerprint(self) -> str | None:
        """What all that are in rotation gave when they had taken over the weights; with their names where they differ."""
        up = self._having("up")
        if len({replica.fingerprint for replica in up}) == 1:
            return up[0].fingerprint
        return ", ".join(f"{replica.fingerprint} ({replica.name})" for replica in up)

    async def close(self) -> None:
        self._closed = True
        for replica in self._replicas:
            if replica.returning:
                replica.returning.cancel()
        await _all([replica.engine.close() for replica in self._replicas])
        await self._tell_waiting()

    def belongs_to(self, folder: Path, tell: Callable[[str, str], None]) -> None:
        """A run: its folder, and what takes kind and text of an event."""
        self.tell = tell
        for engine in self.engines:
            engine.belongs_to(folder)

    def status(self) -> str:
        """What they do at the moment, for people."""
        words = {"up": "", "away": "lost, and expected back; ", "stale": "waits for weights; ", "gone": "given up; "}
        return "\n".join(f"{r.name}: {words[r.state]}{r.engine.status()}" for r in self._replicas)

    def drain_metrics(self) -> Metrics:
        """Counted since they were drained last."""
        metrics = Metrics(
            {f"perf/engine_requests/{k}": Sum(replica.num_requests) for k, replica in enumerate(self._replicas)}
        )
        metrics["perf/resent_requests"] = Sum(self._num_resent)
        metrics["perf/lost_engines"] = Sum(self._num_lost)
        self._num_resent = self._num_lost = 0
        for replica in self._replicas:
            replica.num_requests = 0
        return metrics

    # -- who gets a request --

    async def _chosen(self, session: tuple[int, int]) -> Replica:
        """Waits while none is in rotation, but may be soon."""
        async with self._changed:
            while not (up := self._having("up")):
                if self._closed:
                    raise EngineError("the engine was closed")
                if not self._is_publishing and not any(r.may_return for r in self._replicas):
                    raise self._none_left()
                await self._changed.wait()
        return self._by_group(session[0]) if self._synchronous else self._by_load(session, up)

    def _by_group(self, ticket: int) -> Replica:
        """In turn; of one that is out of rotation, the next one in the row."""
        first = ticket % len(self._replicas)
        return next(r for r in self._replicas[first:] + self._replicas[:first] if r.state == "up")

    def _by_load(self, session: tuple[int, int], up: Sequence[Replica]) -> Replica:
        fit = [replica for replica in up if not replica.is_updating] or up
        least = min(fit, key=lambda replica: replica.num_open)
        keys = session, session[:1]
        kept = next((self._places[key] for key in keys if self._places.get(key) in fit), least)
        chosen = kept if kept.num_open - least.num_open < self._group_size else least
        for key in keys:
            self._places[key] = chosen
            self._places.move_to_end(key)
        while len(self._places) > REMEMBERED:
            self._places.popitem(last=False)
        return chosen

    def _having(self, *states: State) -> list[Replica]:
        return [replica for replica in self._replicas if replica.state in states]

    # -- out of rotation, and back --

    async def _publish(self, replica: Replica, weights: Weights, version: int) -> None:
        replica.is_updating, num_lost = True, replica.num_lost
        try:
            num_bytes = await replica.engine.update_weights(weights, version)  # others add theirs meanwhile
            self._num_bytes += num_bytes
            fingerprint = await replica.engine.fingerprint()
        except EngineLostError as error:
            self._eject(replica, error)
        else:
            if replica.num_lost == num_lost:  # else it may have come back with others between the two
                replica.fingerprint = fingerprint
                self._take_in(replica)
                await self._tell_waiting()
        finally:
            replica.is_updating = False

    def _eject(self, replica: Replica, error: EngineLostError) -> None:
        has_been_told = error.process <= replica.last_lost and replica.state != "up"
        if has_been_told or replica.state == "gone":
            return
        self._count_loss(replica, error)
        if replica.state != "gone" and not replica.returning:
            replica.returning = asyncio.create_task(self._return(replica))

    def _count_loss(self, replica: Replica, error: EngineLostError) -> None:
        self._num_lost += 1
        replica.num_lost += 1
        replica.last_lost = error.process
        replica.why, replica.version, replica.is_promised = str(error), None, False
        left = self._max_restarts - replica.num_lost + 1
        replica.state = "away" if left > 0 else "gone"
        then = f"it is started again, {left - 1} more left" if left > 0 else "it is not started again"
        self.tell(
            "engine_died",
            f"{replica.name}: {error}; {replica.num_open} completions were asked for; {then} (engine.max_restarts)",
        )

    async def _return(self, replica: Replica) -> None:
        """As soon as it answers; whether it has the right weights is seen to by `_admit`, or by the publication that goes on."""
        pause_s = 0.0
        while replica.state == "away":
            await asyncio.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s or 1.0)
            try:
                version = self._version
                fingerprint = await replica.engine.fingerprint()
            except EngineLostError as error:
                if error.process > replica.last_lost:
                    self._count_loss(replica, error)
            except WeightsMoved:
                replica.state, replica.is_promised = "stale", True
            except Exception as error:
                replica.state, replica.why = "gone", str(error)
                if not isinstance(error, TrainingError):  # which ends the run, and is no fault of the engine
                    self.tell("engine_died", f"{replica.name}: {error}; it is given up")
            else:
                if (
                    replica.state == "away" and version == self._version
                ):  # else it may have read what was published before
                    replica.fingerprint, replica.state = fingerprint, "stale"
        replica.returning = None
        await self._admit()

    async def _admit(self) -> None:
        """Into rotation, those that have the weights that were published last. Of others, the next publication sees to it."""
        for replica in self._having("stale"):
            if not (self._is_publishing or replica.is_promised) and self._agreed in (None, replica.fingerprint):
                self._take_in(replica)
        await self._tell_waiting()

    def _take_in(self, replica: Replica) -> None:
        if replica.state != "up":
            self.tell("engine_returned", f"{replica.name} answers again, with the weights of version {self._version}")
        replica.state, replica.version, replica.is_promised = "up", self._version, False

    async def _tell_waiting(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _none_left(self) -> EngineGoneError:
        return EngineGoneError("; ".join(self._why_out(replica) for replica in self._replicas))

    def _why_out(self, replica: Replica) -> str:
        if replica.state == "stale":
            return (
                f"{replica.name} answers again, but with other weights ({replica.fingerprint}) than were published last"
            )
        if replica.num_lost <= self._max_restarts:
            return f"{replica.name}: {replica.why}"
        times = "once" if replica.num_lost == 1 else f"{replica.num_lost} times"
        return f"{replica.name} died {times} (limit: engine.max_restarts), at last so: {replica.why}"


async def _all(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Side by side; the first error ends the others and is raised."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for each in work:
                tasks.create_task(each)
    except BaseExceptionGroup as errors:
        error = first_error(errors)
        raise error from error.__cause__
