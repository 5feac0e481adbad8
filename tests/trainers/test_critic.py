"""The critic: a value for every token, its own gradient and optimiser, and a policy that it leaves alone."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_local_trainer import SETTINGS, gradient_of, loss_of, row, some_samples
from torch import Tensor, nn

from models import tiny_model
from sluice.algorithms import assign_advantages
from sluice.algorithms.diagnostics import explained_variance
from sluice.data.batch import Layout, Packing, make_minibatch
from sluice.errors import NonFiniteError
from sluice.trainers.critic import Critic
from sluice.trainers.local import LocalTrainer
from sluice.trainers.model import PolicyModel
from sluice.trainers.optim import Optimizer
from sluice.types import Sample

PPO, LOSS = row("ppo"), loss_of("ppo")
each_layout = pytest.mark.parametrize("layout", ["rows", "packed"])
each_body = pytest.mark.parametrize("own", [True, False], ids=["own", "head"])


def actor_and_critic(own: bool, packing: Packing | None = None, **settings: Any) -> LocalTrainer:
    model = tiny_model("qwen3")
    optimizer = replace(SETTINGS, **settings)
    critic = Critic(model, tiny_model("qwen3", seed=1) if own else None, optimizer, 100, 0.5)
    nn.init.normal_(critic.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))  # values that differ
    return LocalTrainer(
        model, None, Optimizer(model.model, optimizer, 100), packing or Packing(1, 40, "rows"), critic=critic
    )


def body(trainer: LocalTrainer) -> PolicyModel:
    assert trainer.critic is not None
    return trainer.critic.own_model or trainer.model


def naive_values(trainer: LocalTrainer, sample: Sample) -> Tensor:
    """[T - 1] of all tokens but the first, from the state before each: transformers' own forward, one sequence."""
    assert trainer.critic is not None
    output = body(trainer).model(input_ids=torch.tensor([sample.token_ids]), output_hidden_states=True)
    hidden = output.hidden_states[-1][0, :-1]
    return trainer.critic.head(hidden if trainer.critic.own_model else hidden.detach())[:, 0]


def ready(trainer: LocalTrainer, samples: Sequence[Sample]) -> None:
    """What the loop does before the first update."""
    asyncio.run(trainer.forward(samples, "old_logprobs"))
    asyncio.run(trainer.forward(samples, "values"))
    for sample in samples:
        sample.reward = float(sample.group)
    assign_advantages(PPO, samples)


def own_tokens(sample: Sample) -> list[int]:
    return [t for t, weight in enumerate(sample.loss_weights) if weight]


@each_layout
@each_body
def test_values_are_those_of_the_samples_one_by_one(own: bool, layout: Layout):
    trainer, samples = actor_and_critic(own, Packing(1, 40, layout)), some_samples()
    asyncio.run(trainer.forward(samples, "values"))
    for sample in samples:
        expected = [0.0, *naive_values(trainer, sample).tolist()]
        expected = [v if w else 0.0 for v, w in zip(expected, sample.loss_weights, strict=True)]
        assert sample.values == pytest.approx(expected, abs=1e-4)


def test_a_new_critic_says_0_so_that_the_first_advantages_are_the_returns():
    model = tiny_model("qwen3")
    critic = Critic(model, None, SETTINGS, 10, 0.5)
    samples = some_samples()
    trainer = LocalTrainer(model, None, Optimizer(model.model, SETTINGS, 10), Packing(1, 40, "rows"), critic=critic)
    asyncio.run(trainer.forward(samples, "values"))
    assert all(value == 0.0 for sample in samples for value in sample.values)


@each_body
@pytest.mark.parametrize("budget", [1, 1000])
def test_the_gradient_is_that_of_the_value_loss_over_the_update(own: bool, budget: int):
    """½·max of the free and the clipped squared error, over all loss tokens of the update, whatever the cut."""
    trainer, samples = actor_and_critic(own), some_samples()
    ready(trainer, samples)
    for sample in samples:  # as after some updates: the values have moved, some of them beyond the clip
        sample.values = [v + (0.9 if t % 2 else -0.2) for t, v in enumerate(sample.values)]
    terms = []
    for sample in samples:
        values = naive_values(trainer, sample)
        for t in own_tokens(sample):
            value, old, target = values[t - 1], sample.values[t], sample.returns[t]
            terms.append(max((value - target) ** 2, (min(max(value, old - 0.5), old + 0.5) - target) ** 2) / 2)
    (sum(terms) / len(terms)).backward()
    assert trainer.critic is not None
    expected = [p.grad.clone() for p in trainer.critic.optimizer.params if p.grad is not None]
    trainer.critic.optimizer.adamw.zero_grad()
    metrics = asyncio.run(
        trainer.forward_backward(make_minibatch(samples, Packing(1, budget, "rows"), PPO, 0), None)
    ).values_by_name()
    actual = [p.grad for p in trainer.critic.optimizer.params if p.grad is not None]
    scale = max(float(g.abs().max()) for g in expected)
    assert len(actual) == len(expected) > 0
    assert max(float((a - e).abs().max()) for a, e in zip(actual, expected, strict=True)) < 1e-5 * scale
    assert metrics["train/value_loss"] == pytest.approx(float(sum(terms).detach()) / len(terms), rel=1e-4)
    assert 0 < metrics["train/value_clipfrac"] < 1


@each_body
def test_the_policys_gradient_is_the_same_with_and_without_a_critic(own: bool):
    trainer, samples = actor_and_critic(own), some_samples()
    ready(trainer, samples)
    alone = copy.deepcopy(trainer)
    alone.critic = None
    minibatch = make_minibatch(samples, trainer.packing, PPO, 0)
    gradients = []
    for one in (trainer, alone):
        asyncio.run(one.forward_backward(minibatch, LOSS))
        gradients.append(gradient_of(one.model))
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@each_body
def test_pretraining_moves_the_critic_and_not_a_bit_of_the_policy(own: bool):
    trainer, samples = actor_and_critic(own), some_samples()
    ready(trainer, samples)
    before = copy.deepcopy(trainer.model.model.state_dict())
    assert trainer.critic is not None
    head = trainer.critic.head.weight.detach().clone()
    metrics = asyncio.run(trainer.forward_backward(make_minibatch(samples, trainer.packing, PPO, 0), None))
    metrics += asyncio.run(trainer.optim_step())
    assert not torch.equal(trainer.critic.head.weight, head)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.model.state_dict().items())
    assert trainer.optimizer.update == 0  # the policy's schedule has not begun
    assert {name for name in metrics if "critic" in name} == {
        "train/critic/grad_norm",
        "train/critic/learning_rate",
    }
    assert "train/grad_norm" not in metrics
    assert "train/pg_loss" not in metrics
    assert all(sample.update == -1 for sample in samples)  # no policy update took them


@each_body
def test_a_value_loss_that_is_not_finite_leaves_no_gradient_of_the_update(own: bool):
    """Nor of the policy's loss, which came before."""
    trainer, samples = actor_and_critic(own), some_samples()
    ready(trainer, samples)
    samples[-1].returns = [float("nan")] * len(samples[-1])
    assert trainer.critic is not None
    with pytest.raises(NonFiniteError, match="loss of the critic is nan; the update was refused"):
        asyncio.run(trainer.forward_backward(make_minibatch(samples, trainer.packing, PPO, 0), LOSS))
    assert gradient_of(trainer.model) == {}
    assert all(p.grad is None for p in trainer.critic.optimizer.params)


@each_body
def test_a_critic_learns_what_its_states_foretell(own: bool):
    trainer, samples = actor_and_critic(own, learning_rate=1e-2), some_samples()

    def explained() -> float:
        asyncio.run(trainer.forward(samples, "values"))
        pairs = [(s.values[t], float(s.group)) for s in samples for t in own_tokens(s)]
        return explained_variance(*torch.tensor(pairs, dtype=torch.float64).unbind(1))

    ready(trainer, samples)
    before = explained()
    for _ in range(40):
        ready(trainer, samples)
        asyncio.run(trainer.forward_backward(make_minibatch(samples, trainer.packing, PPO, 0), None))
        asyncio.run(trainer.optim_step())
    assert explained() > max(0.5, before + 0.3)


def test_a_bf16_critic_steps_fp32_masters():
    model = tiny_model("qwen3", scale=1.0)
    own = tiny_model("qwen3", scale=1.0, seed=1)
    own.model.bfloat16()
    critic = Critic(model, PolicyModel(own.model), SETTINGS, 10, None)
    trainer = LocalTrainer(model, None, Optimizer(model.model, SETTINGS, 10), Packing(1, 40, "rows"), critic=critic)
    samples = some_samples()
    ready(trainer, samples)
    asyncio.run(trainer.forward_backward(make_minibatch(samples, trainer.packing, PPO, 0), None))
    assert all(master.dtype == torch.float32 for master in critic.optimizer.masters)
    asyncio.run(trainer.optim_step())
    assert critic.head.weight.dtype == torch.float32
    assert float(critic.head.weight.detach().abs().max()) > 0
