"""From a config to its models, engine and trainer. Rooms that load torch are imported when they are needed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sluice.algorithms import Algorithm
from sluice.config import (
    DryTrainer,
    EmbeddedEngine,
    FsdpTrainer,
    LocalTrainer,
    ScriptedEngine,
    SftConfig,
    TrainConfig,
)
from sluice.configengines import ServerEngine
from sluice.configtraining import AdapterFields, BatchedOptimizer, OptimizerSection
from sluice.data.chat import Chat, load_tokenizer
from sluice.errors import ConfigError
from sluice.launch.checked import Checked, check_fits, check_second, check_vocabulary
from sluice.launch.cores import engine_threads

if TYPE_CHECKING:
    from sluice.data.batch import Packing
    from sluice.engines.embedded import EmbeddedEngine as Embedded
    from sluice.engines.router import Router
    from sluice.interfaces import Engine, Trainer
    from sluice.launch.placing import Placement
    from sluice.trainers.local import LocalTrainer as Local
    from sluice.trainers.model import PolicyModel
    from sluice.trainers.optim import Optimizer, OptimizerSettings
    from sluice.weights.broadcast import Broadcast
    from sluice.weights.disk import Disk
    from sluice.weights.publication import Publication


@dataclass(frozen=True)
class Parts:
    """Of a run, what has to do with its model."""

    engine: Engine
    trainer: Trainer
    packing: Packing
    eos_ids: frozenset[int]
    vocab_size: int | None
    """Of the model; None without one."""
    max_length: int | None
    """Positions of the model."""
    routing: tuple[int, int] | None
    """With routing replay: experts that a token takes in all layers, and those that a layer has."""


def engine_and_trainer(config: TrainConfig, checked: Checked, chat: Chat, placement: Placement) -> Parts:
    packing = packing_of(config)
    if isinstance(config.trainer, DryTrainer):
        from sluice.trainers.dry import DryTrainer as Dry

        trainer, model, on_gpu = Dry(), None, False
    elif isinstance(config.trainer, FsdpTrainer):
        from sluice.launch.ranks import ranked_trainer

        trainer, model = ranked_trainer(config, checked.algorithm, chat, packing, placement)
        on_gpu = trainer.on_gpu
    else:
        trainer = policy_trainer(config, checked.algorithm, chat, packing)
        model = trainer.model
        on_gpu = model.device.type == "cuda"
    engine = _engine(config, checked, chat, placement, model)
    if isinstance(config.engine, ServerEngine) and config.engine.sleep:
        from sluice.launch.colocated import ColocatedTrainer

        # what it does not say itself, it asks the trainer
        trainer = cast("Trainer", ColocatedTrainer(trainer, cast("Router", engine).engines, on_gpu=on_gpu))
    if model is None:
        return Parts(engine, trainer, packing, chat.eos_ids, None, None, None)
    routing = (model.routers.num_chosen, model.routers.num_experts) if model.routers else None
    vocab_size, eos_ids = model.config.vocab_size, chat.eos_ids | model.eos_ids
    return Parts(engine, trainer, packing, eos_ids, vocab_size, model.max_length, routing)


def _engine(
    config: TrainConfig, checked: Checked, chat: Chat, placement: Placement, model: PolicyModel | None
) -> Engine:
    """`model` is the trainer's, or its outline: names and shapes."""
    if isinstance(config.engine, ScriptedEngine):
        from sluice.engines.scripted import ScriptedEngine as Scripted

        assert checked.script is not None
        return Scripted(
            checked.script, max_model_len=config.engine.max_model_len, max_delay_s=config.engine.max_delay_s
        )

    assert model is not None  # the config refuses an embedded engine beside a dry trainer
    check_fits(config, model.config.vocab_size, model.max_length)
    if isinstance(config.engine, ServerEngine):
        from sluice.launch.servers import servers

        return servers(config, config.engine, model, chat, placement)
    if config.engine.process == "trainer":
        return embedded_engine(config.engine, model, chat)

    return engines_apart(config, model, placement)


def engines_apart(config: TrainConfig, model: PolicyModel, placement: Placement) -> Router:
    """Embedded engines, each in a process of its own."""
    from sluice.engines.process import EngineProcess
    from sluice.engines.router import Router

    settings, rollout = config.engine, config.rollout
    assert isinstance(settings, EmbeddedEngine)
    synchronous = rollout.max_staleness == 0
    finish_limit_s = rollout.timeout_s if settings.on_new_weights == "finish" else None
    publication = publication_of(config, model, placement.host)
    engines = [
        EngineProcess(
            publication,
            partial(engine_apart, config),
            name=f"engine-{k}" if settings.replicas > 1 else "engine",
            synchronous=synchronous,
            finish_limit_s=finish_limit_s,
            hang_timeout_s=settings.hang_timeout_s,
            launch=placement.engine(k, publication.fds),
        )
        for k in range(settings.replicas)
    ]
    return Router(engines, synchronous=synchronous, max_restarts=settings.max_restarts, group_size=rollout.group_size)


def publication_of(config: TrainConfig, model: PolicyModel, host: str) -> Publication:
    """How weights get to engines of ours in other processes, which reach this machine at `host`."""
    if config.weights_go_by() == "shared_memory":
        from sluice.weights.shared_memory import SharedMemory

        return SharedMemory(model.named_weights())
    return publication_afar(config, model, host)


def publication_afar(config: TrainConfig, model: PolicyModel, host: str) -> Broadcast | Disk:
    """One that engines of other makes can take part in, and on other machines."""
    settings = config.engine
    assert not isinstance(settings, ScriptedEngine)
    if config.weights_go_by() == "disk":
        from sluice.weights.disk import Disk

        parent = Path(settings.publication_folder) if settings.publication_folder else None
        return Disk(parent, adapter=config.publishes_adapters())
    from sluice.weights.broadcast import Broadcast
    from sluice.weights.publication import PUBLISH_LIMIT_S

    # before it takes weights over, an engine may finish what it has begun
    limit_s = PUBLISH_LIMIT_S + (config.rollout.timeout_s if settings.on_new_weights == "finish" else 0.0)
    return Broadcast(model.named_weights(), limit_s=limit_s, host=host)


def embedded_engine(settings: EmbeddedEngine, model: PolicyModel, chat: Chat) -> Embedded:
    from sluice.engines.embedded import EmbeddedEngine as Embedded

    return Embedded(
        model,
        chat.decode,
        vocab_size=model.config.vocab_size,
        num_slots=settings.num_slots,
        max_model_len=settings.max_model_len,
        prefill_tokens=settings.prefill_tokens,
        cache_bytes=None if settings.cache_gb is None else int(settings.cache_gb * 1e9),
        in_flight=settings.process == "own",
    )


def engine_apart(config: TrainConfig) -> Embedded:
    """In a process of its own, with weights that come from elsewhere."""
    assert isinstance(config.engine, EmbeddedEngine)
    set_up_process(engine_threads(config))
    chat = Chat(load_tokenizer(config.model.path))
    architecture = config.model.model_copy(update={"random_weights": True})
    model = load_policy(config.model_copy(update={"model": architecture}), chat)
    if config.rollout.routing_replay:
        model.replay_routing()
    return embedded_engine(config.engine, model, chat)


def packing_of(config: TrainConfig) -> Packing:
    from sluice.data.batch import Packing

    trainer = config.trainer
    if isinstance(trainer, DryTrainer):
        return Packing(trainer.updates_per_batch, 2**20, "rows")  # that nobody computes on
    ranks = trainer.num_data_ranks if isinstance(trainer, FsdpTrainer) else 1
    return Packing(trainer.updates_per_batch, trainer.tokens_per_micro_batch, trainer.layout, ranks)


def policy_trainer(config: TrainConfig, algorithm: Algorithm, chat: Chat, packing: Packing) -> Local:
    """With the reference and the critic that the algorithm needs."""
    from sluice.trainers.optim import Optimizer

    settings, critic = config.trainer, config.critic
    assert isinstance(settings, LocalTrainer)
    policy = load_policy(config, chat)
    if config.rollout.routing_replay:
        policy.replay_routing()
    model = trained(adapted(policy, settings, config.run.seed, apart=config.publishes_adapters()), settings)
    reference = _reference(config, chat, model) if algorithm.needs_reference else None
    has_own = algorithm.needs_values and critic.model == "own"
    own = trained(_second(config, chat, "critic.path", critic.path, model), settings) if has_own else None

    optimizer = optimizer_of(settings, model, policy_updates(config))
    return learner(config, algorithm, chat, packing, model, reference, own, optimizer, Optimizer)


def learner(
    config: TrainConfig,
    algorithm: Algorithm,
    chat: Chat,
    packing: Packing,
    model: PolicyModel,
    reference: PolicyModel | None,
    critic_model: PolicyModel | None,
    optimizer: Optimizer,
    make_optimizer: Callable[..., Optimizer],
) -> Local:
    """The trainer of one process over models that are there."""
    from sluice.trainers.critic import Critic
    from sluice.trainers.local import LocalTrainer as Local

    settings = config.critic
    num_updates = config.run.num_steps * config.trainer.updates_per_batch
    critic = (
        Critic(model, critic_model, optimizer_settings(settings), num_updates, settings.value_clip, make_optimizer)
        if algorithm.needs_values
        else None
    )
    return Local(
        model,
        chat.tokenizer,
        optimizer,
        packing,
        reference=reference,
        critic=critic,
        couples_tokens=algorithm.couples_tokens,
        entropy_gradient=algorithm.entropy_coef > 0,
    )


def policy_updates(config: TrainConfig) -> int:
    """Of a run; while only the critic learns there are none."""
    return (config.run.num_steps - config.critic.pretrain_steps) * config.trainer.updates_per_batch


def load_policy(
    config: TrainConfig | SftConfig, chat: Chat, key: str = "model.path", path: str | None = None
) -> PolicyModel:
    """The policy's model, or a second one of the run: from the `path` that `key` names, or else one that begins as the policy."""
    from sluice.trainers.model import load_model

    settings = config.model
    key = key if path else "model.path"
    model = load_model(
        path or settings.path,
        key=key,
        dtype=settings.dtype,
        device=settings.device,
        random_weights=settings.random_weights and not path,
        seed=config.run.seed,
    )
    check_vocabulary(f"{key}={path or settings.path}", len(chat.tokenizer), model.config.vocab_size)
    return model


def adapted(model: PolicyModel, settings: AdapterFields, seed: int, *, apart: bool = False) -> PolicyModel:
    """With adapters, if such are to be trained instead of the model itself; `apart` as `LoraModel` has it."""
    if settings.lora_rank is None:
        return model
    check_adapters(model, settings)
    from sluice.trainers.lora import LoraModel

    return LoraModel(
        model,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        targets=settings.lora_targets,
        seed=seed,
        apart=apart,
    )


def check_adapters(model: PolicyModel, settings: AdapterFields) -> None:
    """Whether a model can have them. Raises ConfigError without peft, and for targets that are not there."""
    try:
        from sluice.trainers.lora import adapted_layers
    except ModuleNotFoundError as error:
        raise ConfigError(f"trainer.lora_rank: {error}; pip install peft") from error
    adapted_layers(model, settings.lora_targets)


def trained(model: PolicyModel, settings: BatchedOptimizer) -> PolicyModel:
    """A model that will have backwards."""
    if settings.activation_checkpointing:
        model.recompute_activations()
    if settings.compile:
        model.compile()
    return model


def _second(config: TrainConfig, chat: Chat, key: str, path: str | None, policy: PolicyModel) -> PolicyModel:
    """A reference or a critic: it sees the policy's tokens, at the policy's positions."""
    model = load_policy(config, chat, key, path)
    own, theirs = (model.config.vocab_size, model.max_length), (policy.config.vocab_size, policy.max_length)
    check_second(config, key, path, chat, own, theirs)
    return model


def _reference(config: TrainConfig, chat: Chat, policy: PolicyModel) -> PolicyModel:
    reference = _second(config, chat, "reference.path", config.reference.path, policy)
    if config.reference.update_every_steps and reference.architecture() != policy.architecture():
        raise ConfigError(
            f"reference.update_every_steps copies the policy into the reference, and reference.path={config.reference.path} has "
            "another architecture; leave one of the two out"
        )
    return reference


def optimizer_of(settings: OptimizerSection, model: PolicyModel, num_updates: int) -> Optimizer:
    from sluice.trainers.optim import Optimizer

    return Optimizer(model.model, optimizer_settings(settings), num_updates)


def optimizer_settings(settings: OptimizerSection) -> OptimizerSettings:
    from sluice.trainers.optim import OptimizerSettings

    return OptimizerSettings(**{field.name: getattr(settings, field.name) for field in fields(OptimizerSettings)})


def set_up_process(num_threads: int | None) -> None:
    """Its threads, if that many were asked for, and that it keeps the memory that tensors leave behind.

    By default the C library gives large blocks back at once, and each new tensor pays for fresh pages, which shows in rollouts of a
    small model. What is above 32 MiB, the most that it lets one choose, still goes back.
    """
    if num_threads is not None:
        import torch

        torch.set_num_threads(num_threads)
    with suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def give_back_unused_memory() -> None:
    """Of the GPU: what tensors have left behind."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""As malloc.h of glibc has them."""
