"""An engine that only takes time: replicas that decode their sequences side by side, as fast as a few constants say.

It stands where an engine stands in a run, so what asks it is the real code. It must run in a `VirtualTimeLoop`.

A simulated token list holds stretches of tokens and not tokens: each entry is a number of tokens, and its policy version is that of
the weights that made them. So a response of 30,000 tokens that lived through two publications is a list of three numbers, and buffer,
worker, checks and trainer treat it as they treat any other.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sluice.interfaces import Weights
from sluice.types import Completion, Sampling

_ROUNDING = 1e-6
"""Tokens by which sequences that end together may be apart by rounding."""
_ROUNDING_S = 1e-9
"""By which a timer may be early."""


@dataclass(frozen=True)
class EngineRates:
    """What a replica takes, in seconds. A decode step, which gives every active sequence a token, takes
    `step_s` + active sequences · `sequence_s` + tokens in the cache · `cached_token_s`."""

    step_s: float
    sequence_s: float
    cached_token_s: float = 0.0
    prompt_token_s: float = 0.0
    """Of computing a prompt, per token; nothing is decoded meanwhile."""
    request_s: float = 0.0
    """Of taking a request up; nothing is decoded meanwhile."""

    def __post_init__(self) -> None:
        if self.step_s + self.sequence_s + self.cached_token_s <= 0:
            raise ValueError(f"decoding takes no time in {self}")

    def decode_s(self, num_tokens: float, active: int, cached: float) -> float:
        """Of `num_tokens` steps with `active` sequences, which have `cached` tokens before the first one and grow by one in each."""
        first = self.step_s + active * self.sequence_s + cached * self.cached_token_s
        return num_tokens * (first + active * self.cached_token_s * num_tokens / 2)

    def decoded(self, seconds: float, active: int, cached: float) -> float:
        """The inverse: how many steps that time is enough for, parts of one included."""
        first = self.step_s + active * self.sequence_s + cached * self.cached_token_s
        growth = active * self.cached_token_s
        if growth == 0:
            return seconds / first
        return 2 * seconds / (first + math.sqrt(first * first + 2 * growth * seconds))


@dataclass(frozen=True)
class EngineFailures:
    between_s: float
    """Mean time between two failures of a replica; they come by chance."""
    restart_s: float
    """Until it decodes again. What it was decoding is asked for again, from the beginning."""


@dataclass(frozen=True)
class EngineSetting:
    replicas: int
    slots: int
    """Sequences that a replica decodes at once."""
    rates: EngineRates
    publication_s: float = 0.0
    """Of giving all replicas new weights, in which none of them decodes."""
    failures: EngineFailures | None = None


@dataclass
class _Request:
    prompt_tokens: int
    length: int
    done: asyncio.Future[list[tuple[int, int]]]
    start: float = 0.0
    """Where its replica stood when it was taken up."""


class _Replica:
    """Steps that it has made are counted as a real number; between two events everything follows from the clock."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine
        self.rates = engine.setting.rates
        self.is_up = True
        self.active: list[tuple[float, int, _Request]] = []
        """A heap by the step at which they end."""
        self.made = 0.0
        """Steps since the simulation began."""
        self.cached = 0.0
        """Tokens of all active sequences, their prompts included."""
        self.versions: list[tuple[float, int]] = [(0.0, 0)]
        """(steps made, version of the weights from then on)"""
        self.busy_s = 0.0
        self._at = 0.0
        self._held_until = 0.0
        """It decodes nothing before: prompts are computed, or weights are changed."""
        self._timer: asyncio.TimerHandle | None = None
        self._is_planned = False

    def catch_up(self) -> None:
        """To the present time, and past the sequences that ended meanwhile: an engine goes on while the loop that asks it is held up."""
        now = self.engine.loop.time()
        while self.active and (due := self._next_end()) <= now + _ROUNDING_S:
            self._advance(min(due, now))
            self._end(self.active[0][0])
        self._advance(now)

    def _next_end(self) -> float:
        """Time at which the first of the sequences ends."""
        left = max(0.0, self.active[0][0] - self.made)
        begin = max(self._at, self._held_until)
        return begin + self.rates.decode_s(left, len(self.active), self.cached)

    def _advance(self, time: float) -> None:
        """With the same sequences."""
        begin = max(self._at, min(self._held_until, time))
        if self.active:
            self.busy_s += time - self._at
            made = self.rates.decoded(time - begin, len(self.active), self.cached)
            self.made += made
            self.cached += made * len(self.active)
        self._at = time

    def _end(self, made: float) -> None:
        """The sequences that are through when so many steps have been made, whatever rounding says; others take their place."""
        self.cached += (made - self.made) * len(self.active)
        self.made = made
        while self.active and self.active[0][0] <= made + _ROUNDING:
            _, _, request = heapq.heappop(self.active)
            self.cached -= request.prompt_tokens + request.length
            if not request.done.done():
                request.done.set_result(list(self._stretches(request)))
        self.cached = max(0.0, self.cached) if self.active else 0.0
        self.plan()
        self.engine.freed(self)

    def hold(self, seconds: float) -> None:
        """It decodes nothing for so long; one such time begins where the other ends."""
        self._held_until = max(self._held_until, self._at) + seconds
        self.plan()

    def begin(self, request: _Request) -> None:
        request.start = self.made
        heapq.heappush(self.active, (self.made + request.length, self.engine.next_number(), request))
        self.cached += request.prompt_tokens
        self.hold(self.rates.request_s + request.prompt_tokens * self.rates.prompt_token_s)

    def note_version(self, version: int) -> None:
        self.versions = [*self.versions[bisect_right(self.versions, (self._oldest_start(), math.inf)) - 1 :]]
        self.versions.append((self.made, version))

    def fail(self) -> list[_Request]:
        """All that it was decoding."""
        self.catch_up()
        self.is_up = False
        lost = [request for _, _, request in sorted(self.active)]
        self.active.clear()
        self.cached = 0.0
        self.plan()
        return lost

    def plan(self) -> None:
        """Look at it again when its next sequence ends; once for all that happens at one instant."""
        if not self._is_planned:
            self._is_planned = True
            self.engine.loop.call_soon(self._planned)

    def _planned(self) -> None:
        self._is_planned = False
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self.active:
            self._timer = self.engine.loop.call_at(self._next_end(), self._due)

    def _due(self) -> None:
        self._timer = None
        self.catch_up()
        self.plan()

    def _stretches(self, request: _Request) -> Iterator[tuple[int, int]]:
        """(tokens, version) in their order."""
        last = bisect_right(self.versions, (request.start, math.inf)) - 1
        begin = 0
        for number in range(last, len(self.versions)):
            is_last = number + 1 == len(self.versions)
            end = request.length if is_last else round(self.versions[number + 1][0] - request.start)
            end = min(end, request.length)
            if end > begin:
                yield end - begin, self.versions[number][1]
                begin = end

    def _oldest_start(self) -> float:
        return min((request.start for *_, request in self.active), default=self.made)


@dataclass
class SimulatedEngine:
    """Requests wait together, and go to the replica that decodes the fewest as soon as one has a free slot."""

    setting: EngineSetting
    length_of: Callable[[Sampling], int]
    """How many tokens a request is answered with."""
    seed: int = 0
    version: int = 0
    num_lost_tokens: float = 0.0
    """That were decoded, and again elsewhere."""
    num_failures: int = 0
    replicas: list[_Replica] = field(init=False)

    def __post_init__(self) -> None:
        self.loop: Any = asyncio.get_running_loop()
        self._numbers = 0
        self._waiting: deque[_Request] = deque()
        self.replicas = [_Replica(self) for _ in range(self.setting.replicas)]
        self._free = [(0, i) for i in range(len(self.replicas))]
        """A heap of (active sequences, replica); entries that no longer hold are dropped when they are met."""
        self._index = {id(replica): i for i, replica in enumerate(self.replicas)}
        self._random = random.Random(f"failures {self.seed}")
        self._timers: dict[int, asyncio.TimerHandle] = {}
        if self.setting.failures:
            for i in range(len(self.replicas)):
                self._fail_some_day(i)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        request = _Request(sum(prompt_ids), self.length_of(sampling), self.loop.create_future())
        self._waiting.append(request)
        self._dispatch()
        stretches = await request.done
        return Completion(
            token_ids=[tokens for tokens, _ in stretches],
            logprobs=[0.0] * len(stretches),
            finish_reason="stop",
            policy_versions=[version for _, version in stretches],
            temperature=sampling.temperature,
        )

    async def update_weights(self, weights: Weights, version: int) -> int:
        """Under unfinished completions, whose later tokens are by the new ones."""
        for replica in self.replicas:
            replica.catch_up()
            replica.hold(self.setting.publication_s)
        await asyncio.sleep(self.setting.publication_s)
        self.version = version
        for replica in self.replicas:
            replica.catch_up()
            replica.note_version(version)
        return 0

    async def unfinished(self) -> dict[int, Completion]:
        """No checkpoint asks for them."""
        return {}

    def status(self) -> str:
        return f"{sum(len(r.active) for r in self.replicas)} sequences are decoded, {len(self._waiting)} wait"

    async def fingerprint(self) -> None:
        """There are no weights."""

    async def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def busy_s(self) -> float:
        """Of all replicas together."""
        for replica in self.replicas:
            replica.catch_up()
        return sum(replica.busy_s for replica in self.replicas)

    def freed(self, replica: _Replica) -> None:
        """It takes up what waits, which would not wait if another one had a free slot."""
        while self._waiting and len(replica.active) < self.setting.slots:
            replica.begin(self._waiting.popleft())
        self._offer(self._index[id(replica)])

    def _offer(self, i: int) -> None:
        replica = self.replicas[i]
        if replica.is_up and len(replica.active) < self.setting.slots:
            heapq.heappush(self._free, (len(replica.active), i))

    def _dispatch(self) -> None:
        while self._waiting and self._free:
            load, i = heapq.heappop(self._free)
            replica = self.replicas[i]
            replica.catch_up()
            if replica.is_up and load == len(replica.active):
                replica.begin(self._waiting.popleft())
                self._offer(i)

    # -- failures --

    def _fail_some_day(self, i: int) -> None:
        assert self.setting.failures
        wait_s = self._random.expovariate(1 / self.setting.failures.between_s)
        self._timers[i] = self.loop.call_later(wait_s, self._fail, i)

    def _fail(self, i: int) -> None:
        assert self.setting.failures
        replica = self.replicas[i]
        lost = replica.fail()
        self.num_failures += 1
        self.num_lost_tokens += sum(replica.made - request.start for request in lost)
        self._waiting.extendleft(reversed(lost))
        self._timers[i] = self.loop.call_later(self.setting.failures.restart_s, self._return, i)
        self._dispatch()

    def _return(self, i: int) -> None:
        self.replicas[i].is_up = True
        self._fail_some_day(i)
        self._offer(i)
        self._dispatch()
