"""From a config to a trainer of several ranks, and in a rank's process to its part of it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from sluice.algorithms import Algorithm
from sluice.config import FsdpTrainer, TrainConfig
from sluice.data.chat import Chat, load_tokenizer
from sluice.errors import ConfigError
from sluice.launch.checked import check_heads, check_second, check_vocabulary
from sluice.launch.cores import rank_threads
from sluice.launch.models import (
    check_adapters,
    learner,
    load_policy,
    optimizer_settings,
    policy_updates,
    set_up_process,
    trained,
)

if TYPE_CHECKING:
    from sluice.data.batch import Packing
    from sluice.launch.placing import Placement
    from sluice.trainers.fsdp import Degrees, ParallelState, ShardedModel
    from sluice.trainers.local import LocalTrainer as Local
    from sluice.trainers.model import PolicyModel
    from sluice.trainers.ranks import RankedTrainer


def degrees_of(settings: FsdpTrainer) -> Degrees:
    from sluice.trainers.fsdp import Degrees

    return Degrees(settings.num_ranks, settings.tensor_parallel, settings.context_parallel)


def ranked_trainer(
    config: TrainConfig, algorithm: Algorithm, chat: Chat, packing: Packing, placement: Placement
) -> tuple[RankedTrainer, PolicyModel]:
    """The trainer of several processes, and its model's outline. Raises ConfigError for a model that cannot be divided so."""
    from sluice.trainers.fsdp import check_layers
    from sluice.trainers.model import load_outline
    from sluice.trainers.ranks import RankedTrainer

    settings = config.trainer
    assert isinstance(settings, FsdpTrainer)
    on_gpu = placement.ranks_have_gpus if placement.at else gpus_of(config) > 0
    if settings.cpu_offload and not on_gpu:
        raise ConfigError("trainer.cpu_offload has no effect without a GPU, where all is in RAM; leave it out")
    if not placement.at and 0 < (num_gpus := gpus_of(config)) < settings.num_ranks:
        raise ConfigError(
            f"trainer.num_ranks={settings.num_ranks}, and this machine has {num_gpus} GPU{'s' * (num_gpus > 1)}, of which each rank "
            "takes one; lower it, or set model.device=cpu"
        )
    outline = load_outline(config.model.path, dtype=config.model.dtype)
    check_vocabulary(f"model.path={config.model.path}", len(chat.tokenizer), outline.config.vocab_size)
    check_heads(config, *outline.num_heads)
    check_layers(outline, degrees_of(settings))
    if config.rollout.routing_replay:
        outline.replay_routing()
    if settings.lora_rank is not None:
        check_adapters(outline, settings)
    trainer = RankedTrainer(
        partial(rank_trainer, config, algorithm, packing),
        degrees_of(settings),
        packing,
        list(outline.named_weights()),
        chat.tokenizer,
        on_gpu=on_gpu,
        answer_limit_s=settings.answer_limit_s,
        launch=placement.rank if placement.at else None,
    )
    return trainer, outline


def rank_trainer(config: TrainConfig, algorithm: Algorithm, packing: Packing, parallel: ParallelState) -> Local:
    """In a rank's process: rank 0 loads each model, and every rank keeps its shard of it."""
    from sluice.trainers.sharded_optim import ShardedOptimizer

    settings, critic = config.trainer, config.critic
    assert isinstance(settings, FsdpTrainer)
    set_up_process(rank_threads(config))
    chat = Chat(load_tokenizer(config.model.path))
    model = _sharded(config, chat, parallel, learns=True)
    reference = None
    if algorithm.needs_reference:
        reference = _sharded(config, chat, parallel, "reference.path", config.reference.path, model)
    own = None
    if algorithm.needs_values and critic.model == "own":
        own = _sharded(config, chat, parallel, "critic.path", critic.path, model, learns=True, with_head=False)
    optimizer = ShardedOptimizer(
        model.model, optimizer_settings(settings), policy_updates(config), parallel=parallel, model=model
    )
    make_optimizer = partial(ShardedOptimizer, parallel=parallel)
    return learner(config, algorithm, chat, packing, model, reference, own, optimizer, make_optimizer)


def _sharded(
    config: TrainConfig,
    chat: Chat,
    parallel: ParallelState,
    key: str = "model.path",
    path: str | None = None,
    policy: PolicyModel | None = None,
    *,
    learns: bool = False,
    with_head: bool = True,
) -> ShardedModel:
    """Weights that learn have FP32 shards, whatever is computed with: those of the model, or of the adapters that the policy is trained
    by. A second model is checked against the `policy`."""
    from sluice.trainers.fsdp import ShardedModel, check_layers
    from sluice.trainers.model import DTYPES, load_outline

    settings = config.trainer
    assert isinstance(settings, FsdpTrainer)
    key = key if path else "model.path"
    has_adapters = policy is None and settings.lora_rank is not None
    dtype = "float32" if learns and not has_adapters else config.model.dtype
    outline = load_outline(path or config.model.path, key=key, dtype=dtype)
    if policy:
        own, theirs = (outline.config.vocab_size, outline.max_length), (policy.config.vocab_size, policy.max_length)
        check_second(config, key, path, chat, own, theirs)
        check_layers(outline, parallel.degrees)
    elif config.rollout.routing_replay:
        outline.replay_routing()
    whole = None
    if parallel.rank == 0:
        in_ram = config.model.model_copy(update={"device": "cpu", "dtype": dtype})
        whole = load_policy(config.model_copy(update={"model": in_ram}), chat, key, path)
    parts = (outline, whole, parallel, DTYPES[config.model.dtype])
    if has_adapters:
        model = _with_adapters(config, settings, *parts)
    else:
        model = ShardedModel(*parts, with_head=with_head, cpu_offload=settings.cpu_offload)
    if learns:
        trained(model, settings)
    else:
        model.model.requires_grad_(False)
    return model


def _with_adapters(config: TrainConfig, settings: FsdpTrainer, *parts: Any) -> ShardedModel:
    from sluice.trainers.sharded_lora import ShardedLoraModel

    assert settings.lora_rank is not None
    return ShardedLoraModel(
        *parts,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        targets=settings.lora_targets,
        seed=config.run.seed,
        apart=config.publishes_adapters(),
        cpu_offload=settings.cpu_offload,
    )


def gpus_of(config: TrainConfig) -> int:
    """Of this machine, that ranks may take."""
    import torch

    return 0 if config.model.device == "cpu" else torch.cuda.device_count()
