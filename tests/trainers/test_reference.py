"""The reference policy stays where it is while the policy moves, until it is told to follow."""

from __future__ import annotations

import asyncio
import copy

import pytest
import torch
from test_local_trainer import SETTINGS, gradient_of, naive_logprobs, row, some_samples

from models import tiny_model
from sluice.algorithms import policy_loss
from sluice.data.batch import Packing, make_minibatch
from sluice.trainers.local import LocalTrainer
from sluice.trainers.optim import Optimizer
from sluice.types import Sample

KL = row("grpo", kl_coef=0.5)


def with_reference() -> LocalTrainer:
    model = tiny_model("qwen3")
    return LocalTrainer(
        model,
        None,
        Optimizer(model.model, SETTINGS, 100),
        Packing(1, 40, "rows"),
        reference=tiny_model("qwen3", seed=1),
        entropy_gradient=True,
    )


def kl_loss(logprobs: torch.Tensor, entropies: torch.Tensor, batch: object) -> object:
    columns = batch.old_logprobs, batch.advantages, batch.loss_weights, batch.sequence_ids  # type: ignore[attr-defined]
    return policy_loss(
        row("grpo", kl_coef=0.5, entropy_coef=0.1),
        logprobs,
        *columns,
        coefficients=batch.coefficients,  # type: ignore[attr-defined]
        ref_logprobs=batch.ref_logprobs,  # type: ignore[attr-defined]
        entropies=entropies,
    )


def expected_logprobs(trainer: LocalTrainer, sample: Sample) -> list[float]:
    assert trainer.reference is not None
    values = [0.0, *naive_logprobs(trainer.reference, sample).tolist()]
    return [value if weight else 0.0 for value, weight in zip(values, sample.loss_weights, strict=True)]


def test_reference_logprobs_are_the_references_before_and_after_the_policy_moved():
    trainer, samples = with_reference(), some_samples()
    asyncio.run(trainer.forward(samples, "ref_logprobs"))
    before = [list(sample.ref_logprobs) for sample in samples]
    for sample in samples:
        assert sample.ref_logprobs == pytest.approx(expected_logprobs(trainer, sample), abs=1e-4)
    asyncio.run(trainer.forward_backward(make_minibatch(samples, trainer.packing, KL, 0), kl_loss))
    asyncio.run(trainer.optim_step())
    asyncio.run(trainer.forward(samples, "ref_logprobs"))
    assert [sample.ref_logprobs for sample in samples] == before


def test_an_updated_reference_is_the_policy():
    trainer, samples = with_reference(), some_samples()
    asyncio.run(trainer.update_reference())
    asyncio.run(trainer.forward(samples, "ref_logprobs"))
    asyncio.run(trainer.forward(samples, "old_logprobs"))
    assert [sample.ref_logprobs for sample in samples] == [sample.old_logprobs for sample in samples]
    assert trainer.reference is not None
    assert trainer.reference.model is not trainer.model.model  # a copy: it stays behind again


@pytest.mark.parametrize("budget", [1, 1000])
def test_the_gradient_of_kl_and_entropy_is_the_formulas(budget: int):
    """Through the trainer, against autograd over the model's own logits: k3 against the reference, and the entropy."""
    trainer, samples = with_reference(), some_samples()
    for sample in samples:
        sample.advantages = [0.0] * len(sample)  # what is left is the KL term and the bonus
    asyncio.run(trainer.forward(samples, "ref_logprobs"))
    model = copy.deepcopy(trainer.model)
    total = torch.zeros(())
    for sample in samples:
        logits = model.model(input_ids=torch.tensor([sample.token_ids])).logits[0, :-1].double() / sample.temperature
        logp = torch.log_softmax(logits, -1)
        own = [t for t, weight in enumerate(sample.loss_weights) if weight]
        d = [logp[t - 1, sample.token_ids[t]] - sample.ref_logprobs[t] for t in own]
        kl = sum(torch.exp(-x) - 1 + x for x in d)
        entropy = sum(-(logp[t - 1].exp() * logp[t - 1]).sum() for t in own)
        total = total + (0.5 * kl - 0.1 * entropy) / len(own) / len(samples)
    total.backward()
    expected = gradient_of(model)
    metrics = asyncio.run(
        trainer.forward_backward(make_minibatch(samples, Packing(1, budget, "rows"), KL, 0), kl_loss)
    ).values_by_name()
    actual = gradient_of(trainer.model)
    scale = max(float(g.abs().max()) for g in expected.values())
    assert max(float((actual[name] - expected[name]).abs().max()) for name in expected) < 1e-5 * scale
    assert metrics["train/loss"] == pytest.approx(float(total.detach()), rel=1e-4)
    assert metrics["train/kl_loss"] > 0
