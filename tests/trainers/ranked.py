"""A trainer of several ranks over a tiny model, and the local one beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from models import CONFIGS, tiny_model
from sluice.algorithms import Algorithm, resolve
from sluice.data.batch import Packing, make_minibatch
from sluice.interfaces import Layout
from sluice.trainers.critic import Critic
from sluice.trainers.fsdp import Degrees, ParallelState, ShardedModel
from sluice.trainers.local import LocalTrainer
from sluice.trainers.lora import LoraModel
from sluice.trainers.model import PolicyModel
from sluice.trainers.optim import Optimizer, OptimizerSettings
from sluice.trainers.ranks import RankedTrainer
from sluice.trainers.sharded_lora import ShardedLoraModel
from sluice.trainers.sharded_optim import ShardedOptimizer
from sluice.types import Sample
from sluice.update import loss_of
from sluice.weights.shared_memory import SharedWeights

STATELESS = OptimizerSettings(1.0, 0, "constant", 0.0, (0.0, 0.0), 1.0, 0.0, 1e9)
"""AdamW whose step is g / (|g| + 1): what the weights move by tells the gradient, and no step depends on those before it."""


@dataclass(frozen=True)
class Setup:
    """What a trainer is made of, on one rank or on many."""

    architecture: str = "qwen3"
    algorithm: Algorithm = field(default_factory=lambda: row("cispo"))
    dtype: torch.dtype = torch.float32
    optimizer: OptimizerSettings = STATELESS
    critic: str | None = None
    reference: bool = False
    recompute: bool = False
    compile: bool = False
    """Of the ranks."""
    routing: bool = False
    """Whether what the engine's routers chose is replayed."""
    adapters: dict[str, Any] | None = None
    """What is trained, when it is not the weights: of `LoraModel`."""
    layout: Layout = "packed"
    budget: int = 40

    def packing(self, degrees: Degrees) -> Packing:
        return Packing(1, self.budget, self.layout, degrees.data)


def row(name: str, **words: Any) -> Algorithm:
    return resolve(name, words, max_new_tokens=16, group_size=2)


def outline(architecture: str, dtype: torch.dtype) -> PolicyModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=dtype)
    return PolicyModel(model)


def rank_trainer(setup: Setup, parallel: ParallelState) -> LocalTrainer:
    torch.set_num_threads(1)
    model = _sharded(setup, parallel, seed=0, learns=True, adapters=setup.adapters, routing=setup.routing)
    if setup.recompute:
        model.recompute_activations()
    if setup.compile:
        model.compile()
    optimizer = ShardedOptimizer(model.model, setup.optimizer, 100, parallel=parallel, model=model)
    critic = None
    if setup.critic:
        own = _sharded(setup, parallel, seed=2, learns=True, with_head=False) if setup.critic == "own" else None
        critic = Critic(model, own, setup.optimizer, 100, 0.5, partial(ShardedOptimizer, parallel=parallel))
    reference = _sharded(setup, parallel, seed=1, learns=False) if setup.reference else None
    return _trainer(setup, parallel.degrees, model, optimizer, critic, reference)


def local_trainer(setup: Setup, weights: Sequence[tuple[str, Tensor]] | None = None) -> LocalTrainer:
    """With these weights, or with those that the ranks begin with."""
    model = tiny_model(setup.architecture, setup.dtype)
    if weights is not None:
        model.model.load_state_dict(dict(weights), strict=False)
    if setup.routing:
        model.replay_routing()
    if setup.adapters:
        model = LoraModel(model, **setup.adapters)
    if setup.recompute:
        model.recompute_activations()
    critic = None
    if setup.critic:
        own = tiny_model(setup.architecture, setup.dtype, seed=2) if setup.critic == "own" else None
        critic = Critic(model, own, setup.optimizer, 100, 0.5)
    reference = tiny_model(setup.architecture, setup.dtype, seed=1) if setup.reference else None
    optimizer = Optimizer(model.model, setup.optimizer, 100)
    return _trainer(setup, Degrees(1, 1, 1), model, optimizer, critic, reference)


def _trainer(setup: Setup, degrees: Degrees, model: Any, optimizer: Any, critic: Any, reference: Any) -> LocalTrainer:
    return LocalTrainer(
        model,
        None,
        optimizer,
        setup.packing(degrees),
        reference=reference,
        critic=critic,
        couples_tokens=setup.algorithm.couples_tokens,
        entropy_gradient=setup.algorithm.entropy_coef > 0,
    )


def _sharded(
    setup: Setup,
    parallel: ParallelState,
    seed: int,
    *,
    learns: bool,
    with_head: bool = True,
    adapters: dict[str, Any] | None = None,
    routing: bool = False,
) -> ShardedModel:
    dtype = torch.float32 if learns and not adapters else setup.dtype
    whole = None
    if parallel.rank == 0:
        whole = tiny_model(setup.architecture, setup.dtype, seed)
        whole.model.to(dtype)  # rounded as the local trainer's are, from which its masters are made
    shapes = outline(setup.architecture, dtype)
    if routing:
        shapes.replay_routing()
    parts = (shapes, whole, parallel, setup.dtype)
    if adapters:
        return ShardedLoraModel(*parts, **adapters)
    model = ShardedModel(*parts, with_head=with_head)
    model.model.requires_grad_(learns)
    return model


class NoTokenizer:
    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer_config.json").write_text("{}")


@asynccontextmanager
async def ranks(
    setup: Setup, num: int, tensor: int = 1, context: int = 1, folder: Path | None = None
) -> AsyncIterator[RankedTrainer]:
    degrees = Degrees(num, tensor, context)
    shapes = list(outline(setup.architecture, setup.dtype).named_weights())
    trainer = RankedTrainer(
        partial(rank_trainer, setup),
        degrees,
        setup.packing(degrees),
        shapes,
        NoTokenizer(),
        on_gpu=False,
        answer_limit_s=600.0 if setup.compile else 120.0,
    )
    if folder:
        trainer.belongs_to(folder)
    try:
        yield trainer
    finally:
        await trainer.close()


async def weights_of(trainer: RankedTrainer, setup: Setup) -> list[tuple[str, Tensor]]:
    """Through memory that driver and rank 0 share."""
    model = tiny_model(setup.architecture, setup.dtype)
    shared = SharedWeights(model.named_weights())
    await trainer.weights().copy_to(shared)
    shared.read(model.named_weights())
    return [(name, tensor.detach().clone()) for name, tensor in model.named_weights()]


async def updated(
    trainer: Any, samples: Sequence[Sample], setup: Setup, layout: Layout, algorithm: Algorithm
) -> dict[str, float]:
    """One update; the metrics of it."""
    packing = replace(trainer.packing, layout=layout)
    minibatch = make_minibatch(samples, packing, algorithm, 0)
    loss = partial(loss_of, algorithm, "engine")
    metrics = await trainer.forward_backward(minibatch, loss)
    return (metrics + await trainer.optim_step()).values_by_name()


def run(work: Any) -> Any:
    return asyncio.run(work)
