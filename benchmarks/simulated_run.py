"""A whole run in virtual time: the loop, the workers, the buffer, the checks and the policy are the real ones, and what computes only
takes time. See `simulated_engine.py` for what a token is."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import virtual_time
from distributions import Distribution
from simulated_engine import EngineSetting, SimulatedEngine
from simulated_trainer import SimulatedTrainer, TrainerFailures, TrainerRates
from sluice.algorithms import resolve
from sluice.checks import CHECKS, Checker
from sluice.data.batch import Packing
from sluice.interfaces import Policy
from sluice.rollout.buffer import GroupBuffer, Limits
from sluice.run import Run
from sluice.train import train
from sluice.types import Group, Message, Prompt, Sample, Sampling, Trajectory
from sluice.waits import Wait

CHECKED = ("staleness", "trained_once", "groups_whole", "loss_mask", "outcome_budget")
"""Checks that have something to look at without a model; what one of them finds ends the simulation."""
NEVER_S = 1e9


@dataclass(frozen=True)
class Agent:
    """An environment of several turns: between two calls of the policy a tool runs, for which it needs one of `workers`."""

    turns: int
    tool_s: Distribution
    observation_tokens: int
    workers: int | None = None
    """Tools that run at once; None: as many as want to."""


@dataclass(frozen=True)
class Setting:
    engine: EngineSetting
    trainer: TrainerRates
    lengths: Distribution
    """Tokens of a response."""
    groups_per_step: int
    group_size: int
    max_staleness: int
    num_steps: int
    prompt_tokens: int = 256
    updates_per_batch: int = 1
    reward_s: Distribution | None = None
    agent: Agent | None = None
    trainer_failures: TrainerFailures | None = None
    record_s: float = 0.0
    """Of writing the ledger of a step, for which the loop waits while the workers go on."""
    micro_batches: int | None = None
    """Where the trainer computes in the process of the loop, which stands still meanwhile: parts of an update between which the loop runs.
    None: it computes elsewhere."""
    seed: int = 0


@dataclass
class Outcome:
    """Of the steps after the first ones, in which nothing is in a steady state yet."""

    step_s: list[float]
    tokens: int
    """Of responses, trained on."""
    engine_busy: float
    """Share of the time in which a replica decodes something."""
    trainer_busy: float
    ages: Counter[int]
    """Updates between the weights that made a token and those that it trained, by number of tokens."""
    failures: int
    lost_tokens: float
    tools_at_once: float
    """That ran or waited for a worker, in the mean."""
    most_tools_at_once: int
    most_attempts: int
    """Attempts that were under way at once."""

    @property
    def seconds(self) -> float:
        return math.fsum(self.step_s)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def staleness(self) -> float:
        """In the mean over tokens."""
        return sum(age * num for age, num in self.ages.items()) / max(1, self.ages.total())


def warm_up_steps(max_staleness: int) -> int:
    return 2 * (max_staleness + 1)


def simulate(setting: Setting, warm_up: int | None = None) -> Outcome:
    """`warm_up` steps do not count; left out, so many that what was begun under the first weights is gone."""
    return virtual_time.run(_simulated(setting, warm_up_steps(setting.max_staleness) if warm_up is None else warm_up))


async def _simulated(setting: Setting, warm_up: int) -> Outcome:
    engine = SimulatedEngine(setting.engine, setting.lengths.length, setting.seed)
    trainer = SimulatedTrainer(
        setting.trainer,
        setting.trainer_failures,
        shared_tokens=setting.prompt_tokens
        * (1 - 1 / setting.group_size),  # a packed row has the prompt of a group once
        updates_per_batch=setting.updates_per_batch,
        micro_batches=setting.micro_batches,
        seed=setting.seed,
    )
    environment = Environment(setting)
    notes = Notes(engine, trainer, environment, warm_up)
    try:
        await train(_run(setting, engine, trainer, environment, notes))
    finally:
        await engine.close()
    return notes.outcome()


def _run(setting: Setting, engine: Any, trainer: Any, environment: Any, notes: Notes) -> Run:
    limits = Limits(rejected=10 * setting.groups_per_step, failed=4)
    checks = {**dict.fromkeys(CHECKS, "off"), **dict.fromkeys(CHECKED, "stop")}
    return Run(
        engine=engine,
        trainer=trainer,
        environment=environment.play,
        rubric=SimulatedRubric(setting),
        chat=SimulatedChat(setting),
        buffer=GroupBuffer(setting.groups_per_step, setting.max_staleness, limits),
        prompts=Prompts(),
        algorithm=resolve("cispo", {}, max_new_tokens=2**31, group_size=setting.group_size),
        packing=Packing(setting.updates_per_batch, 2**40, "rows"),
        sampling=Sampling(max_new_tokens=2**31),
        tracker=notes,
        rundir=SimpleNamespace(),  # type: ignore[arg-type]
        checks=Checker(checks, logprob_tolerance=1.0, max_error_share=0.0),  # type: ignore[arg-type]
        seed=setting.seed,
        num_steps=setting.num_steps,
        groups_per_step=setting.groups_per_step,
        group_size=setting.group_size,
        max_staleness=setting.max_staleness,
        old_logprobs="engine",
        pretrain_steps=0,
        update_reference_every=None,
        long_prompts="error",
        group_filter=None,
        attempt_timeout_s=NEVER_S,
        engine_retries=0,
        vocab_size=None,
        max_length=None,
        routing=None,
        stop_at_reward=None,
        checkpoints=Recording(setting),
    )


class Environment:
    def __init__(self, setting: Setting) -> None:
        self.agent = setting.agent
        self.loop = asyncio.get_running_loop()
        self._workers = asyncio.Semaphore(setting.agent.workers) if setting.agent and setting.agent.workers else None
        self._random = random.Random(f"tools {setting.seed}")
        self.attempts = self.most_attempts = self.tools = self.most_tools = 0
        self._tool_seconds, self._at = 0.0, 0.0

    async def play(self, prompt: Prompt, policy: Policy) -> Trajectory:
        self.attempts += 1
        self.most_attempts = max(self.most_attempts, self.attempts)
        try:
            messages = [*prompt.messages, await policy.respond(prompt.messages)]
            for _ in range(self.agent.turns - 1 if self.agent else 0):
                await self._run_tool()
                messages.append({"role": "tool", "content": ""})
                messages.append(await policy.respond(messages))
        finally:
            self.attempts -= 1
        return Trajectory(policy.turns, stop_reason="stop")  # type: ignore[attr-defined]

    async def _run_tool(self) -> None:
        assert self.agent
        seconds = self.agent.tool_s.at(self._random.random())
        self._count(1)
        try:
            async with _slot_of(self._workers):
                await asyncio.sleep(seconds)
        finally:
            self._count(-1)

    def _count(self, more: int) -> None:
        self.tool_seconds()
        self.tools += more
        self.most_tools = max(self.most_tools, self.tools)

    def tool_seconds(self) -> float:
        """Of all tools so far, their waiting for a worker included."""
        now = self.loop.time()
        self._tool_seconds += self.tools * (now - self._at)
        self._at = now
        return self._tool_seconds


@asynccontextmanager
async def _slot_of(workers: asyncio.Semaphore | None) -> Any:
    if workers is None:
        yield
        return
    async with workers:
        yield


class SimulatedRubric:
    def __init__(self, setting: Setting) -> None:
        self.reward_s = setting.reward_s
        self._random = random.Random(f"rewards {setting.seed}")

    async def score(self, prompt: Prompt, trajectory: Trajectory, wait: Wait) -> None:
        share = self._random.random()
        if self.reward_s:
            await asyncio.sleep(self.reward_s.at(share))
        trajectory.outcome, trajectory.reward = "scored", float(share < 0.5)


class SimulatedChat:
    def __init__(self, setting: Setting) -> None:
        self.prompt_tokens = setting.prompt_tokens
        self.observation_tokens = setting.agent.observation_tokens if setting.agent else 0

    def encode(self, messages: Sequence[Message]) -> list[int]:
        return [self.prompt_tokens]

    def encode_next(self, ids: list[int], *_: Any) -> list[int]:
        return [*ids, self.observation_tokens]

    def decode(self, ids: Sequence[int]) -> str:
        return ""


class Prompts:
    def __getitem__(self, ticket: int) -> Prompt:
        return Prompt(f"p{ticket}", [{"role": "user", "content": ""}])


@dataclass
class Recording:
    """Stands where checkpoints are written, which is the one place at which the loop waits after a step."""

    setting: Setting

    def step_ended(self) -> None: ...

    async def after_step(self, run: Run, metrics: dict[str, float]) -> None:
        await asyncio.sleep(self.setting.record_s)


@dataclass
class _Standing:
    """Sums since the beginning, at one moment."""

    at: float = 0.0
    engine_busy_s: float = 0.0
    trainer_busy_s: float = 0.0
    tool_s: float = 0.0
    failures: int = 0
    lost_tokens: float = 0.0


@dataclass
class Notes:
    """The tracker: what comes out of it is read off the virtual clock."""

    engine: SimulatedEngine
    trainer: SimulatedTrainer
    environment: Environment
    warm_up: int
    ends: list[float] = field(default_factory=list[float])
    tokens: int = 0
    ages: Counter[int] = field(default_factory=Counter[int])
    begin: _Standing = field(default_factory=_Standing)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.ends.append(self.engine.loop.time())
        if step == self.warm_up:
            self.begin = self._standing()

    def log_groups(
        self, step: int, groups: Sequence[Group], samples: Sequence[Sample], fingerprint: str | None = None
    ) -> None:
        if step <= self.warm_up:
            return
        for sample in samples:
            for tokens, version in zip(sample.token_ids, sample.policy_versions, strict=True):
                if version >= 0:
                    self.ages[step - 1 - version] += tokens
                    self.tokens += tokens

    def event(self, kind: str, message: str, **details: Any) -> None:
        raise RuntimeError(f"an event that a simulation does not have: {kind}: {message}")

    def close(self) -> None: ...

    def outcome(self) -> Outcome:
        begin, end = self.begin, self._standing()
        seconds = end.at - begin.at
        ends = [begin.at, *self.ends[self.warm_up :]]
        return Outcome(
            step_s=[b - a for a, b in pairwise(ends)],
            tokens=self.tokens,
            engine_busy=(end.engine_busy_s - begin.engine_busy_s) / (len(self.engine.replicas) * seconds),
            trainer_busy=(end.trainer_busy_s - begin.trainer_busy_s) / seconds,
            ages=self.ages,
            failures=end.failures - begin.failures,
            lost_tokens=end.lost_tokens - begin.lost_tokens,
            tools_at_once=(end.tool_s - begin.tool_s) / seconds,
            most_tools_at_once=self.environment.most_tools,
            most_attempts=self.environment.most_attempts,
        )

    def _standing(self) -> _Standing:
        engine, trainer = self.engine, self.trainer
        return _Standing(
            at=engine.loop.time(),
            engine_busy_s=engine.busy_s(),
            trainer_busy_s=trainer.busy_s,
            tool_s=self.environment.tool_seconds(),
            failures=engine.num_failures + trainer.num_failures,
            lost_tokens=engine.num_lost_tokens,
        )
