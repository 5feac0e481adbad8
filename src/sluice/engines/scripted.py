"""An engine without a model: a function says what is answered. For trying data, rewards and the loop, and for tests."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

from sluice.engines.sampling import check_room
from sluice.errors import EngineError, boundary
from sluice.interfaces import Weights
from sluice.types import Completion, Sampling

Script = Callable[[Sequence[int], Sampling], Sequence[int]]
"""(prompt ids, sampling) → token ids of the answer."""


class ScriptedEngine:
    """Every token gets the log-prob 0: to the script, its answer was certain.

    `max_delay_s` makes each completion take a random time, drawn from `delay_seed`; what is answered never depends
    on it.
    """

    def __init__(
        self, script: Script, *, max_model_len: int = 4096, max_delay_s: float = 0.0, delay_seed: int = 0
    ) -> None:
        self.script = script
        self.max_model_len = max_model_len
        self.max_delay_s = max_delay_s
        self.version = 0
        self._num_open = 0
        self._random = random.Random(delay_seed)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        check_room(prompt_ids, sampling, self.max_model_len)
        version = self.version
        self._num_open += 1
        try:
            if self.max_delay_s:
                await asyncio.sleep(self._random.uniform(0, self.max_delay_s))
        finally:
            self._num_open -= 1
        with boundary(EngineError, "the script of the scripted engine"):
            answer = list(self.script(prompt_ids, sampling))
        token_ids = answer[: sampling.max_new_tokens]
        return Completion(
            token_ids=token_ids,
            logprobs=[0.0] * len(token_ids),
            finish_reason="length" if len(answer) > len(token_ids) else "stop",
            policy_versions=[version] * len(token_ids),
            temperature=sampling.temperature,
        )

    async def update_weights(self, weights: Weights, version: int) -> int:
        self.version = version
        return 0

    async def unfinished(self) -> dict[int, Completion]:
        """An answer is there as a whole or not at all."""
        return {}

    def status(self) -> str:
        """What it does at the moment, for people."""
        return f"{self._num_open} completions wait for their delay; weights of version {self.version}"

    async def fingerprint(self) -> None:
        """There are no weights."""

    async def close(self) -> None:
        pass
