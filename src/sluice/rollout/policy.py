"""The engine as an environment sees it: messages in, a message out, and every turn on record."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from sluice.interfaces import Engine
from sluice.types import Message, Sampling, Turn


class SamplingPolicy:
    """One per trajectory. `seed` seeds its calls one after the other."""

    def __init__(self, engine: Engine, chat: Any, sampling: Sampling, seed: str) -> None:
        self.turns: list[Turn] = []
        self._engine = engine
        self._chat = chat
        self._sampling = sampling
        self._seed = seed
        self._num_calls = 0
        self._last: tuple[list[int], list[Message], Message] | None = None  # ids, messages and reply of the last call

    async def respond(self, messages: Sequence[Message]) -> Message:
        messages = deepcopy(list(messages))  # what the environment edits in place later is not what was said here
        prompt_ids = self._chat.encode_next(*self._last, messages) if self._last else None
        prompt_ids = prompt_ids or self._chat.encode(messages)
        sampling = replace(self._sampling, seed=seed_of(f"{self._seed}/{self._num_calls}"))
        self._num_calls += 1  # not the number of turns: calls may run side by side
        completion = await self._engine.generate(prompt_ids, sampling)
        completion.text = self._chat.decode(completion.token_ids)
        self.turns.append(Turn(prompt_ids, completion))
        reply = {"role": "assistant", "content": completion.text}
        self._last = prompt_ids + completion.token_ids, messages, dict(reply)
        return reply


def seed_of(name: str) -> int:
    """63 bits that depend on the name only."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1
