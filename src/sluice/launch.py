"""From a config to a run: the only file that knows every room. Heavy rooms are imported where they are needed."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.algorithms import Algorithm, explain, resolve
from sluice.config import (
    CustomReward,
    EmbeddedEngine,
    FileData,
    FormatReward,
    LocalTrainer,
    MatchReward,
    RunSection,
    SftConfig,
    TrainConfig,
    reward_label,
)
from sluice.configfile import Resolved, dump
from sluice.data.chat import Chat, load_tokenizer
from sluice.data.prompts import PromptSet, PromptStream, load_prompts, load_sft_rows
from sluice.data.sources import Rows, open_rows
from sluice.environments.single_turn import single_turn
from sluice.hooks import resolve as resolve_hook
from sluice.interfaces import Tracker
from sluice.rewards.rubric import RewardSpec, Rubric
from sluice.tracking.console import ConsoleTracker
from sluice.tracking.rundir import RunDir, describe_environment
from sluice.tracking.tracker import FileTracker, Trackers
from sluice.types import Sampling
from sluice.viewer.report import write_report

if TYPE_CHECKING:
    from sluice.config import OptimizerSection
    from sluice.run import Run


@dataclass
class Checked:
    """What can be known of a config without loading a model."""

    algorithm: Algorithm
    prompts: PromptSet
    rewards: list[RewardSpec]
    environment: Callable[..., Any]
    group_filter: Callable[..., Any] | None
    script: Callable[..., Any] | None


def check(config: TrainConfig) -> Checked:
    """Resolve every name and read every data row. Raises ConfigError or DataError."""
    rollout = config.rollout
    environment = single_turn
    if rollout.environment != "single_turn":
        environment = resolve_hook(rollout.environment, ("prompt", "policy"))
    scripted = None if isinstance(config.engine, EmbeddedEngine) else config.engine.script
    return Checked(
        algorithm=resolve(
            config.algorithm.name,
            config.algorithm.overrides(),
            max_new_tokens=rollout.max_new_tokens,
            group_size=rollout.group_size,
        ),
        rewards=[_reward_spec(reward) for reward in config.rewards],
        environment=environment,
        group_filter=resolve_hook(rollout.filter, ("group",)) if rollout.filter else None,
        script=resolve_hook(scripted, ("prompt_ids", "sampling")) if scripted else None,
        prompts=load_prompts(
            _rows(config.data),
            prompt=config.data.prompt,
            reference=config.data.reference,
            reference_pattern=config.data.reference_pattern,
            id=config.data.id,
            metadata=config.data.metadata,
            system_prompt=config.data.system_prompt,
        ),
    )


def describe(config: TrainConfig) -> str:
    """The batch arithmetic in plain words, and the loss with its bounds."""
    rollout, updates = config.rollout, config.trainer.updates_per_batch
    samples = rollout.groups_per_step * rollout.group_size
    algorithm = resolve(
        config.algorithm.name,
        config.algorithm.overrides(),
        max_new_tokens=rollout.max_new_tokens,
        group_size=rollout.group_size,
    )
    share = f"{samples / updates:.4g}" if samples % updates == 0 else f"{samples // updates} or {samples // updates + 1}"
    cut = f", in micro-batches of at most {config.trainer.tokens_per_micro_batch} tokens" if isinstance(config.trainer, LocalTrainer) else ""
    staleness = "synchronous" if not rollout.max_staleness else f"at most {rollout.max_staleness} updates old"
    return "\n".join(
        [
            f"a step   {rollout.groups_per_step} groups × {rollout.group_size} samples = {samples} samples, {staleness}",
            f"         {updates} optimiser update{'s' if updates > 1 else ''} of {share} samples each{cut}",
            f"a run    {config.run.num_steps} steps = {config.run.num_steps * samples} samples, {config.run.num_steps * updates} updates",
            explain(algorithm, config.algorithm.old_logprobs),
        ]
    )


def train(resolved: Resolved, name: str) -> Path:
    """Run a config to its end and return the run folder. `name` names the run when the config does not."""
    from sluice.train import train as loop

    config: TrainConfig = resolved.config
    checked = check(config)
    _set_threads(config.run)
    with RunDir.create(config.run.folder, config.run.name or _timed(name)) as rundir:
        pass
    raise NotImplementedError


def _timed(name: str) -> str:
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
