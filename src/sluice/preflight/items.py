"""The order of a check. What is cheap, and what others need, comes first; a failure skips only what cannot do without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import ExitStack
from typing import Any, TypeVar

from sluice.algorithms import Algorithm
from sluice.config import SftConfig, TrainConfig
from sluice.configengines import ServerEngine, VllmEngine
from sluice.configplacement import RayPlacement
from sluice.configtraining import AdapterFields
from sluice.data.chat import Chat
from sluice.data.prompts import PromptSet
from sluice.describe import algorithm_of
from sluice.launch.checked import (
    check_fits,
    check_heads,
    check_second,
    check_vocabulary,
    checked_reward,
    environment_of,
    filter_of,
    prompts_of,
    script_of,
    window_of,
)
from sluice.launch.checked import (
    check_sft as pairs_of,
)
from sluice.launch.cores import crowding, ranks_elsewhere
from sluice.launch.reachable import check_engine
from sluice.preflight.disk import check_disk, ledger_bytes, num_checkpoints
from sluice.preflight.findings import Item, plural
from sluice.preflight.folder import ModelFolder, check_targets, read_chat, read_folder
from sluice.preflight.gold import check_gold
from sluice.preflight.memory import check_memory, checkpoint_bytes, sft_parts, training_parts
from sluice.preflight.places import check_places
from sluice.preflight.prompts import NO_LIMIT, check_ends, check_pairs, check_prompts
from sluice.preflight.served import check_served
from sluice.preflight.trial import Trial

Rows = TypeVar("Rows", bound=Sized)
NO_MODEL = "trainer.name=dry loads no model"


def check_training(config: TrainConfig, num_rows: int, offline: bool) -> Iterator[Item]:
    """The items of a config of `sluice train`, each as soon as it is known. `num_rows`: whose gold answers are scored.

    `offline` leaves out what needs torch.
    """
    names, algorithm = _names(config)
    yield names
    with ExitStack() as stack:
        trial = None
        if not offline and names.level != "failure":
            trial = stack.enter_context(Trial(config))  # beside the rest, since it takes longest
        data, prompts = _data(config)
        yield data
        model, chat, models = _model(config, algorithm)
        yield model
        policy, broken = models.get("policy"), _broken(names, data, model)
        longest = 0
        if prompts is not None and chat is not None:
            found, longest = check_prompts(config, prompts, chat, policy)
            yield found
        else:
            yield Item.skipped("prompts", _needs("rows and a tokeniser"))
        if prompts is not None and chat is not None and names.level != "failure":
            yield check_gold(config, prompts, chat, num_rows)
        else:
            yield Item.skipped("rewards", _needs("rows, a tokeniser and rewards"))
        if isinstance(config.engine, ServerEngine) or getattr(config.engine, "publication_folder", None):
            yield _engine(config, policy)
        if isinstance(config.placement, RayPlacement):
            yield check_places(config, config.placement)
        if ranks_elsewhere(config):
            yield Item.skipped("memory", "ranks and engines are on machines of the cluster")
        elif policy is not None:
            window = window_of(config, policy.max_length)
            yield check_memory(config, training_parts(config, models, longest or window, window))
        else:
            yield Item.skipped("memory", NO_MODEL if config.trainer.name == "dry" else _needs("the model's config"))
        yield _disk(config, algorithm, models, longest)
        yield _result(trial, broken)


def check_sft(config: SftConfig, offline: bool) -> Iterator[Item]:
    """The items of a config of `sluice sft`."""
    data, pairs = _rows(config, pairs_of)
    yield data
    model, chat, models = _model(config, None)
    yield model
    broken = _broken(data, model)
    with ExitStack() as stack:
        trial, longest = None, 0
        if not offline and not broken:
            assert pairs is not None
            trial = stack.enter_context(Trial(config, pairs))
        if pairs is not None and chat is not None and "policy" in models:
            found, longest = check_pairs(config, pairs, chat, models["policy"])
            yield found
        else:
            yield Item.skipped("pairs", _needs("rows and a tokeniser"))
        if "policy" in models:
            yield check_memory(config, sft_parts(config, models["policy"], longest or models["policy"].max_length))
        else:
            yield Item.skipped("memory", _needs("the model's config"))
        yield check_disk(config, checkpoint_bytes(config, models), len(models), 0)
        yield _result(trial, broken)


def _broken(*items: Item) -> str:
    """The names of those that failed."""
    return " and ".join(item.name for item in items if item.level == "failure")


def _result(trial: Trial | None, broken: str) -> Item:
    if broken:
        return Item.skipped("trial", f"not before {broken} is mended")
    return Item.skipped("trial", "not with --offline") if trial is None else trial.result()


def _needs(what: str) -> str:
    return f"needs {what}, which failed above"


def _names(config: TrainConfig) -> tuple[Item, Algorithm | None]:
    """Everything that the config calls by name."""
    item, algorithm = Item("config"), None
    with item.failing():
        algorithm = algorithm_of(config)
    for reward in config.rewards:
        with item.failing():
            checked_reward(reward)
    for resolve in (environment_of, filter_of, script_of):
        with item.failing():
            resolve(config)
    if crowded := crowding(config):
        item.warn(crowded)
    rollout, run = config.rollout, config.run
    item.summary = (
        f"{config.algorithm.name}, {plural(run.num_steps, 'step')} of {rollout.groups_per_step} groups × {rollout.group_size} "
        f"samples, {plural(config.trainer.updates_per_batch, 'update')} each"
    )
    return item, algorithm


def _data(config: TrainConfig) -> tuple[Item, PromptSet | None]:
    item, prompts = _rows(config, prompts_of)
    if prompts is not None and len(prompts) < config.rollout.groups_per_step:
        item.warn(
            f"{plural(len(prompts), 'row')} for rollout.groups_per_step={config.rollout.groups_per_step}: every step "
            "has some of them several times; lower it, or take more data"
        )
    return item, prompts


def _rows(config: Any, read: Callable[[Any], Rows]) -> tuple[Item, Rows | None]:
    item, rows = Item("data"), None
    with item.failing():
        rows = read(config)
        item.summary = f"{plural(len(rows), 'row')} of {config.data.path}"
    return item, rows


def _model(
    config: TrainConfig | SftConfig, algorithm: Algorithm | None
) -> tuple[Item, Chat | None, dict[str, ModelFolder]]:
    """The tokeniser, and the folders of the policy and of the reference and the critic that the algorithm needs."""
    item, chat, models = Item("model"), None, dict[str, ModelFolder]()
    settings = config.model
    with item.failing():
        chat = read_chat(settings.path)
    if isinstance(config, SftConfig) or config.trainer.name != "dry":
        with item.failing():
            models["policy"] = read_folder(settings.path, random_weights=settings.random_weights)
    else:
        item.summary = f"the tokeniser of {settings.path}; {NO_MODEL}"
    if policy := models.get("policy"):
        positions = f"{policy.max_length} positions" if policy.max_length < NO_LIMIT else "no limit of positions"
        item.summary = f"{policy.config.model_type}, {policy.num_parameters:,} parameters ({policy.counted}), "
        item.summary += f"{policy.vocab_size} ids, {positions}"
        if chat is not None:
            with item.failing():
                check_vocabulary(f"model.path={settings.path}", len(chat.tokenizer), policy.vocab_size)
    if policy and isinstance(config.trainer, AdapterFields):
        with item.failing():
            check_targets(policy, config.trainer.lora_targets)
    if isinstance(config, TrainConfig):
        if policy and config.engine.name != "scripted":
            with item.failing():
                check_fits(config, policy.vocab_size, policy.max_length)
        if policy:
            with item.failing():
                heads = policy.config.num_attention_heads
                check_heads(config, heads, getattr(policy.config, "num_key_value_heads", None) or heads)
        if policy and algorithm is not None:
            _second_models(item, config, algorithm, models, chat)
        if chat is not None and config.engine.name != "scripted":
            check_ends(item, config, chat, policy.eos_ids if policy else frozenset())
    return item, chat, models


def _second_models(
    item: Item, config: TrainConfig, algorithm: Algorithm, models: dict[str, ModelFolder], chat: Chat | None
) -> None:
    policy, critic = models["policy"], config.critic
    wanted = [
        ("reference", config.reference.path, algorithm.needs_reference),
        ("critic", critic.path, algorithm.needs_values and critic.model == "own"),
    ]
    for name, path, is_wanted in wanted:
        if is_wanted:
            models[name] = policy
        if is_wanted and path is not None:
            with item.failing():
                models[name] = own = read_folder(path, key=f"{name}.path")
                if chat is not None:
                    sizes = (own.vocab_size, own.max_length), (policy.vocab_size, policy.max_length)
                    check_second(config, f"{name}.path", path, chat, *sizes)


def _engine(config: TrainConfig, policy: ModelFolder | None) -> Item:
    item, engine = Item("engine"), config.engine
    with item.failing():
        item.summary = check_engine(config)
        if isinstance(engine, VllmEngine) and engine.url and policy is not None:
            check_served(item, config, engine.url, policy)
    return item


def _disk(
    config: TrainConfig, algorithm: Algorithm | None, models: dict[str, ModelFolder], longest_prompt: int
) -> Item:
    experts = 0
    if config.rollout.routing_replay and (policy := models.get("policy")):
        experts = policy.config.num_hidden_layers * getattr(policy.config, "num_experts_per_tok", 0)
    ledger = ledger_bytes(config, algorithm, longest_prompt, experts) if algorithm else 0
    return check_disk(config, checkpoint_bytes(config, models), num_checkpoints(config) if models else 0, ledger)
