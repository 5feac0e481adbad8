"""All that can be known of a config without loading a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sluice.algorithms import Algorithm
from sluice.config import FileData, ScriptedEngine, SftConfig, TrainConfig
from sluice.config import reward_label as label_of
from sluice.data.prompts import PromptSet, SftSet, load_prompts, load_sft_rows
from sluice.data.sources import Rows, open_rows
from sluice.describe import algorithm_of
from sluice.environments.single_turn import single_turn
from sluice.errors import ConfigError
from sluice.hooks import resolve as resolve_hook
from sluice.rewards.spec import RewardSpec, build


@dataclass
class Checked:
    """All that can be known of a config without loading a model."""

    algorithm: Algorithm
    prompts: PromptSet
    rewards: list[RewardSpec]
    environment: Callable[..., Any]
    group_filter: Callable[..., Any] | None
    script: Callable[..., Any] | None


def check(config: TrainConfig) -> Checked:
    """Resolve every name and read every data row. Raises ConfigError or DataError."""
    rollout, engine = config.rollout, config.engine
    return Checked(
        algorithm=algorithm_of(config),
        rewards=[checked_reward(reward) for reward in config.rewards],
        environment=single_turn
        if rollout.environment == "single_turn"
        else _hook("rollout.environment", rollout.environment, "prompt", "policy", awaited=True),
        group_filter=_hook("rollout.filter", rollout.filter, "group") if rollout.filter else None,
        script=_hook("engine.script", engine.script, "prompt_ids", "sampling")
        if isinstance(engine, ScriptedEngine)
        else None,
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


def check_sft(config: SftConfig) -> SftSet:
    """Read every row. Raises DataError."""
    data = config.data
    return load_sft_rows(_rows(data), prompt=data.prompt, response=data.response, system_prompt=data.system_prompt)


def _hook(key: str, dotted: str, *arguments: str, awaited: bool = False) -> Callable[..., Any]:
    try:
        return resolve_hook(dotted, arguments, awaited=awaited)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _rows(data: FileData) -> Rows:
    return open_rows(data.path, data.format, data.split)


def checked_reward(reward: Any) -> RewardSpec:
    arguments = reward.model_dump(exclude={"name", "label", "weight", "timeout_s"})
    spec = RewardSpec(label_of(reward), reward.name, reward.weight, reward.timeout_s, arguments)
    build(spec)
    return spec
