"""Whole runs without a model: real prompts, chat, buffer and loop around a scripted engine and a dry trainer."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from makers import CHAT_TEMPLATE, make_bpe_tokenizer
from sluice.algorithms import resolve
from sluice.checks import Checker
from sluice.configsafety import ChecksSection
from sluice.data.batch import Packing
from sluice.data.chat import Chat, load_tokenizer
from sluice.data.prompts import PromptStream, load_prompts
from sluice.data.sources import open_rows
from sluice.engines.scripted import ScriptedEngine
from sluice.environments.single_turn import single_turn
from sluice.rollout.buffer import GroupBuffer, Limits
from sluice.run import Run
from sluice.trainers.dry import DryTrainer
from sluice.types import Group, Prompt, Sample, Sampling, Trajectory
from sluice.waits import Wait

T = TypeVar("T")
EOS = 1
GROUPS_PER_STEP = 3
GROUP_SIZE = 2
NUM_STEPS = 14
SEVERITIES = {
    **ChecksSection().severities(),
    "weights_match": "off",
    "first_update_ratio": "off",
    "padded_packed": "off",
}
"""All checks that need no model, as they are by default."""


@dataclass(frozen=True)
class Timing:
    """How long things take: at most so many seconds each, drawn from a seed of their own."""

    engine_s: float = 0.0
    score_s: float = 0.0
    train_s: float = 0.0
    seed: int = 0


class Notes:
    """A tracker that keeps all it is told."""

    def __init__(self) -> None:
        self.groups: dict[int, list[Group]] = {}
        self.samples: dict[int, list[Sample]] = {}
        self.metrics: dict[int, dict[str, float]] = {}
        self.events: list[tuple[str, str]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics[step] = metrics

    def log_groups(
        self, step: int, groups: Sequence[Group], samples: Sequence[Sample], fingerprint: str | None = None
    ) -> None:
        self.groups[step], self.samples[step] = list(groups), list(samples)

    def event(self, kind: str, message: str, **details: Any) -> None:
        self.events.append((kind, message))

    def close(self) -> None:
        pass


class NoCheckpoints:
    def step_ended(self) -> None:
        """Nothing is kept."""

    async def after_step(self, run: Run, metrics: dict[str, float]) -> None:
        """None is written."""


@dataclass
class TimedRubric:
    """Scores by a function of (prompt, trajectory), after a random time."""

    reward: Callable[[Prompt, Trajectory], float]
    max_delay_s: float = 0.0
    seed: int = 0
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    async def score(self, prompt: Prompt, trajectory: Trajectory, wait: Wait) -> None:
        wait.at("reward timed")
        if self.max_delay_s:
            await asyncio.sleep(self._random.uniform(0, self.max_delay_s))
        trajectory.outcome, trajectory.reward = "scored", self.reward(prompt, trajectory)


class TimedTrainer(DryTrainer):
    def __init__(self, max_delay_s: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self._max_delay_s, self._random = max_delay_s, random.Random(seed)

    async def forward_backward(self, minibatch: Any, loss: Callable[..., Any] | None) -> Any:
        if self._max_delay_s:
            await asyncio.sleep(self._random.uniform(0, self._max_delay_s))
        return await super().forward_backward(minibatch, loss)


@dataclass
class Workshop:
    """What all runs of a test module share."""

    chat: Chat
    data: Path

    @classmethod
    def make(cls, folder: Path) -> Workshop:
        """One token per byte, so that an answer is tokenised in a later prompt as it was sampled."""
        data = folder / "tasks.jsonl"
        data.write_text("".join(json.dumps({"id": f"q{i}", "prompt": f"task {i}"}) + "\n" for i in range(40)))
        tokenizer = make_bpe_tokenizer(folder / "tokenizer", ["0123456789"], 259, CHAT_TEMPLATE)
        return cls(Chat(load_tokenizer(str(tokenizer))), data)

    def ids(self, text: str) -> list[int]:
        return [*self.chat.tokenizer(text).input_ids, EOS]

    def digits(self, prompt_ids: Sequence[int], sampling: Sampling) -> list[int]:
        """Answers with a number of one to six digits that depends on the seed only."""
        return self.ids(str(sampling.seed % 10 ** (1 + sampling.seed % 6)))

    def digits_or_nothing_new(self, prompt_ids: Sequence[int], sampling: Sampling) -> list[int]:
        """About half of the prompts are too easy: every answer to them is the same."""
        return self.digits(prompt_ids, sampling) if sum(prompt_ids) % 2 else self.ids("7")

    def run(self, timing: Timing | None = None, **changes: Any) -> Run:
        """A run whose reward is the number that was answered; `changes` are fields of Run, or one of the next four."""
        timing = timing or Timing()
        script = changes.pop("script", self.digits)
        reward = changes.pop("reward", lambda prompt, trajectory: float(trajectory.response))
        algorithm = changes.pop("algorithm", "cispo")
        limits = changes.pop("limits", Limits(rejected=10 * GROUPS_PER_STEP, failed=4))
        max_staleness = changes.get("max_staleness", 0)
        seed = changes.get("seed", 0)
        prompts = load_prompts(open_rows(str(self.data)), prompt="prompt", id="id")
        parts: dict[str, Any] = {
            "engine": ScriptedEngine(script, max_model_len=256, max_delay_s=timing.engine_s, delay_seed=timing.seed),
            "trainer": TimedTrainer(timing.train_s, timing.seed),
            "environment": single_turn,
            "rubric": TimedRubric(reward, timing.score_s, timing.seed),
            "chat": self.chat,
            "buffer": GroupBuffer(GROUPS_PER_STEP, max_staleness, limits),
            "prompts": PromptStream(prompts, seed, shuffle=True),
            "algorithm": resolve(algorithm, {}, max_new_tokens=16, group_size=GROUP_SIZE),
            "packing": Packing(updates_per_batch=2, tokens_per_micro_batch=256, layout="rows"),
            "sampling": Sampling(max_new_tokens=16),
            "tracker": Notes(),
            "checks": Checker(SEVERITIES, logprob_tolerance=2e-4, max_error_share=0.5),
            "rundir": SimpleNamespace(),
            "seed": seed,
            "num_steps": NUM_STEPS,
            "groups_per_step": GROUPS_PER_STEP,
            "group_size": GROUP_SIZE,
            "max_staleness": max_staleness,
            "old_logprobs": "engine",
            "long_prompts": "error",
            "group_filter": None,
            "attempt_timeout_s": 60.0,
            "engine_retries": 2,
            "vocab_size": None,
            "max_length": None,
            "routing": None,
            "pretrain_steps": 0,
            "update_reference_every": None,
            "stop_at_reward": None,
            "checkpoints": NoCheckpoints(),
        }
        return Run(**(parts | changes))


def finish(work: Awaitable[T], limit_s: float = 20.0) -> T:
    """Run to the end, within the limit, and see that no task is left behind and none failed unseen."""
    complaints: list[str] = []

    async def whole() -> T:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context["message"]))
        try:
            async with asyncio.timeout(limit_s):
                return await work
        except BaseException:
            gc.collect()  # a task that nobody asked for its exception complains when it is collected
            raise
        finally:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"tasks left behind: {left}"
            assert not complaints, complaints

    return asyncio.run(whole())
