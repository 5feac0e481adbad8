"""All that can be known of a config without loading a model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sluice.algorithms import Algorithm
from sluice.config import FileData, FsdpTrainer, SftConfig, TrainConfig
from sluice.config import reward_label as label_of
from sluice.configengines import ServerEngine
from sluice.configrewards import AnyReward
from sluice.data.chat import Chat, load_tokenizer
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
    check_ray(config)
    if isinstance(config.engine, ServerEngine) and not find_spec("aiohttp"):
        raise ConfigError(f"engine.name={config.engine.name} needs the package aiohttp: pip install aiohttp")
    return Checked(
        algorithm=algorithm_of(config),
        rewards=[checked_reward(reward) for reward in config.rewards],
        environment=environment_of(config),
        group_filter=filter_of(config),
        script=script_of(config),
        prompts=prompts_of(config),
    )


def check_ray(config: TrainConfig) -> None:
    """Raises ConfigError where it is wanted and not installed."""
    if config.placement.name == "ray" and not find_spec("ray"):
        raise ConfigError("placement.name=ray needs the package ray: pip install ray, or set placement.name=local")


def checked_reward(reward: AnyReward) -> RewardSpec:
    """One of `rewards`. Raises ConfigError when it cannot be had or cannot work."""
    arguments = reward.model_dump(exclude={"name", "label", "weight", "timeout_s"})
    spec = RewardSpec(label_of(reward), reward.name, reward.weight, reward.timeout_s, arguments)
    build(spec)
    return spec


def environment_of(config: TrainConfig) -> Callable[..., Any]:
    name = config.rollout.environment
    return (
        single_turn if name == "single_turn" else _hook("rollout.environment", name, "prompt", "policy", awaited=True)
    )


def filter_of(config: TrainConfig) -> Callable[..., Any] | None:
    return _hook("rollout.filter", config.rollout.filter, "group") if config.rollout.filter else None


def script_of(config: TrainConfig) -> Callable[..., Any] | None:
    engine = config.engine
    return _hook("engine.script", engine.script, "prompt_ids", "sampling") if engine.name == "scripted" else None


def prompts_of(config: TrainConfig) -> PromptSet:
    """Read every row. Raises DataError, or ConfigError for data that cannot be what the config says it is."""
    data = config.data
    return load_prompts(
        _rows(data),
        prompt=data.prompt,
        reference=data.reference,
        reference_pattern=data.reference_pattern,
        id=data.id,
        metadata=data.metadata,
        system_prompt=data.system_prompt,
    )


def check_fits(config: TrainConfig, vocab_size: int, max_length: int) -> None:
    """Whether window and stop tokens fit a model of so many ids and positions, and threads this machine. Raises ConfigError."""
    window = window_of(config, max_length)
    if window > max_length:
        raise ConfigError(
            f"engine.max_model_len={window} is longer than the {max_length} positions of the "
            "model; lower it, or leave it out"
        )
    if unknown := [i for i in config.rollout.stop_token_ids if i >= vocab_size]:
        raise ConfigError(f"rollout.stop_token_ids: {unknown[0]} is not among the {vocab_size} ids of the model")
    if config.rollout.max_new_tokens >= window:
        raise ConfigError(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} leaves no room for a prompt in the window of {window} "
            "tokens (engine.max_model_len, or else the model's positions); lower it"
        )
    threads = getattr(config.engine, "num_threads", None) or 1
    if threads > num_cores() and not getattr(config.placement, "address", None):
        raise ConfigError(
            f"engine.num_threads={threads} is more than the {num_cores()} cores that this process may use, and threads that share a core "
            "wait for each other; lower it, or leave it out"
        )


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def check_heads(config: TrainConfig, heads: int, kv_heads: int) -> None:
    """Whether the ranks of a trainer, and the workers of a server, can divide a model's heads as the config says. Raises ConfigError."""
    trainer, engine = config.trainer, config.engine
    workers = engine.tensor_parallel if isinstance(engine, ServerEngine) else 1
    if heads % workers or (kv_heads % workers and workers % kv_heads):
        raise ConfigError(
            f"engine.tensor_parallel={workers} must divide the model's {heads} heads, and its {kv_heads} key-value heads or be a multiple "
            "of them, since each worker attends with its share; lower it"
        )
    if not isinstance(trainer, FsdpTrainer):
        return
    ways = trainer.tensor_parallel * trainer.context_parallel
    if heads % ways or kv_heads % ways:
        raise ConfigError(
            f"trainer.tensor_parallel={trainer.tensor_parallel} × trainer.context_parallel={trainer.context_parallel} must "
            f"divide the model's {heads} heads and {kv_heads} key-value heads, of which each rank attends with its share; lower them"
        )


def window_of(config: TrainConfig, max_length: int) -> int:
    """Longest prompt + completion, in tokens."""
    return config.engine.max_model_len or max_length


def check_vocabulary(where: str, num_tokens: int, vocab_size: int) -> None:
    """Raises ConfigError for a tokeniser with tokens that the model at `where` does not know."""
    if num_tokens > vocab_size:
        raise ConfigError(
            f"{where}: the tokeniser has {num_tokens} tokens and the model {vocab_size}; they do not belong together"
        )


def check_second(
    config: TrainConfig, key: str, path: str | None, chat: Chat, own: tuple[int, int], policys: tuple[int, int]
) -> None:
    """Whether a reference or a critic sees the policy's tokens, at the policy's positions.

    `own` and `policys` are numbers of ids and of positions; `path` is None for one that begins as the policy. Raises ConfigError.
    """
    window = window_of(config, policys[1])
    if own[0] < policys[0] or own[1] < window:
        raise ConfigError(
            f"{key}={path}: {own[0]} ids and {own[1]} positions are fewer than the "
            f"{policys[0]} ids of the policy or the {window} positions of its window"
        )
    has_tokenizer = path is not None and any(Path(path).expanduser().glob("tokenizer*"))
    if path and has_tokenizer and load_tokenizer(path).get_vocab() != chat.tokenizer.get_vocab():
        raise ConfigError(
            f"{key}={path}: its tokeniser has other tokens than the one of model.path={config.model.path}"
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
