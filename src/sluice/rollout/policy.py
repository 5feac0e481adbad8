"""The engine as an environment sees it: messages in, a message out, and every turn on record."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import zip_longest

from sluice.errors import EngineError, EngineGoneError, PromptTooLongError, boundary
from sluice.rollout.calls import joined, rest_of
from sluice.run import Run
from sluice.types import Completion, Message, Sampling, Turn
from sluice.waits import Wait


class SamplingPolicy:
    """One per trajectory, which is the attempt `index` at the prompt of `ticket`: the two seed its calls, one after the other.

    `wait` is told when they wait for the engine.
    """

    def __init__(self, run: Run, ticket: int, index: int, wait: Wait) -> None:
        self.turns: list[Turn] = []
        self._run = run
        self._session = ticket, index
        self._wait = wait
        self._num_calls = 0
        self._num_open = 0
        self._last: tuple[list[int], list[Message], Message] | None = None  # ids, messages and reply of the last call
        self._routed: list[bytes] = []  # of the last call

    def begin_again(self) -> None:
        """For an attempt that is played from its beginning once more: by the same seeds, what was asked is known."""
        self.turns, self._num_calls, self._last = [], 0, None

    async def respond(self, messages: Sequence[Message]) -> Message:
        """Raises PromptTooLongError for a conversation without room, EngineError when every try failed, and EngineGoneError, which
        ends the run, when there is nothing left to try."""
        chat = self._run.chat
        messages = deepcopy(list(messages))  # what the environment edits in place later is not what was said here
        prompt_ids = chat.encode_next(*self._last, messages) if self._last else None
        prompt_ids = prompt_ids or chat.encode(messages)
        completion = await self._generate(prompt_ids)
        # most are those of the call before, which it went through again: one object each, or memory grows with the square of the turns
        completion.routed_experts = [
            before if before == now else now
            for before, now in zip_longest(self._routed[: len(completion.routed_experts)], completion.routed_experts)
        ]
        completion.text = chat.decode(completion.token_ids)
        self.turns.append(Turn(prompt_ids, completion))
        reply = {"role": "assistant", "content": completion.text}
        self._last = prompt_ids + completion.token_ids, messages, dict(reply)
        self._routed = completion.routed_experts
        return reply

    async def _generate(self, prompt_ids: list[int]) -> Completion:
        ticket, index = self._session
        seed = seed_of(f"{self._run.seed}/{ticket}/{index}/{self._num_calls}")
        sampling = replace(self._run.sampling, seed=seed, session=self._session)
        self._num_calls += 1  # not the number of turns: calls may run side by side
        calls = self._run.buffer.calls
        begun, is_all = calls.begin(ticket, prompt_ids, sampling)
        if is_all:
            return begun
        self._wait.at("engine", f"turn {self._num_calls}")
        self._num_open += 1
        try:
            completion = await self._completed(prompt_ids, sampling, begun)
        finally:
            self._num_open -= 1
            if not self._num_open:
                self._wait.at("environment")
        calls.finish(sampling.seed, completion)
        return completion

    async def _completed(self, prompt_ids: list[int], sampling: Sampling, begun: Completion | None) -> Completion:
        if begun is None:
            return await self._tried(prompt_ids, sampling)
        return joined(begun, await self._tried(prompt_ids + begun.token_ids, rest_of(sampling, begun)))

    async def _tried(self, prompt_ids: list[int], sampling: Sampling) -> Completion:
        """The same seed every time: what is sampled does not depend on how often it was tried."""
        for retries_left in reversed(range(self._run.engine_retries + 1)):
            try:
                with boundary(EngineError, "the engine"):
                    return await self._run.engine.generate(prompt_ids, sampling)
            except (PromptTooLongError, EngineGoneError):
                raise
            except EngineError as error:
                if not retries_left:
                    raise
                self._tell_retry(error, retries_left)
        raise AssertionError("the last try returns or raises")

    def _tell_retry(self, error: EngineError, retries_left: int) -> None:
        """Once for a failure that hits many requests: a step of the engine fails for all that are decoded in it."""
        failure = f"{error} in step {self._run.step + 1}, {retries_left} retries left"
        if failure != self._run.engine_failure:
            self._run.engine_failure = failure
            wait = self._wait
            self._run.tracker.event(
                "engine_retry",
                f"{wait.name}, turn {self._num_calls}, {wait.details}: {error}; tried again (rollout.engine_retries)",
                retries_left=retries_left,
            )


def seed_of(name: str) -> int:
    """63 bits that depend on the name only."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1
