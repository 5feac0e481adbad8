"""The optimiser: its schedule by hand, and no update that is lost to rounding or spoilt by a nan."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sluice.configtraining import OptimizerSection
from sluice.errors import NonFiniteError
from sluice.trainers.optim import Optimizer, OptimizerSettings

SETTINGS = OptimizerSettings(
    learning_rate=1e-2,
    warmup_updates=0,
    schedule="constant",
    final_learning_rate=0.0,
    betas=(0.9, 0.95),
    eps=1e-15,
    weight_decay=0.0,
    max_grad_norm=1e9,
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def a_model(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """One matrix [2, 2] and one vector [2], all 1."""
    model = nn.Linear(2, 2, dtype=dtype)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    return model


def update(optimizer: Optimizer, model: nn.Linear, *gradients: float) -> dict[str, float]:
    """One update of these micro-batches, each with one gradient for every weight."""
    for gradient in gradients:
        sum((parameter * gradient).sum() for parameter in model.parameters()).backward()
        optimizer.collect_gradients()
    return optimizer.step(optimizer.clip()).values_by_name()


def first(model: nn.Linear) -> float:
    return float(model.weight.detach()[0, 0])


def state(optimizer: Optimizer, model: nn.Linear) -> list[Tensor]:
    moments = [v.clone() for s in optimizer.adamw.state.values() for v in s.values() if isinstance(v, Tensor)]
    return [p.detach().clone() for p in (*model.parameters(), *optimizer.masters)] + moments


# the schedule


@pytest.mark.parametrize(
    ("schedule", "final", "expected"),
    [
        ("constant", 0.0, {4: 2.0, 5: 2.0, 13: 2.0, 14: 2.0, 99: 2.0}),
        ("linear", 0.5, {4: 2.0, 5: 1.85, 9: 1.25, 13: 0.65, 14: 0.5, 99: 0.5}),
        ("cosine", 0.5, {4: 2.0, 6: 1.25 + 0.75 * math.cos(0.2 * math.pi), 9: 1.25, 14: 0.5, 99: 0.5}),
        ("linear", 0.0, {9: 1.0, 14: 0.0}),
    ],
)
def test_schedule_by_hand(schedule: str, final: float, expected: dict[int, float]):
    """Four updates of warm-up in a run of 14: 0.5, 1, 1.5, 2, then ten to fall."""
    settings = replace(SETTINGS, learning_rate=2.0, warmup_updates=4, schedule=schedule, final_learning_rate=final)
    expected = {0: 0.5, 1: 1.0, 2: 1.5, 3: 2.0} | expected
    assert {n: settings.learning_rate_at(n, 14) for n in expected} == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_without_warm_up_the_first_update_has_the_whole_rate():
    for schedule in ("constant", "linear", "cosine"):
        assert replace(SETTINGS, schedule=schedule).learning_rate_at(0, 10) == 1e-2


def test_warm_up_as_long_as_the_run():
    settings = replace(SETTINGS, warmup_updates=5, schedule="linear")
    assert [settings.learning_rate_at(n, 5) for n in range(5)] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2])


def test_updates_follow_the_schedule():
    """AdamW's first steps under one constant gradient are the learning rate itself."""
    model = a_model()
    optimizer = Optimizer(model, replace(SETTINGS, warmup_updates=2, schedule="linear"), 4)
    seen, before = [], 1.0
    for _ in range(4):
        metrics = update(optimizer, model, 1.0)
        seen.append(before - first(model))
        before = first(model)
        assert metrics["train/learning_rate"] == pytest.approx(seen[-1], rel=1e-4)
    assert seen == pytest.approx([0.005, 0.01, 0.01, 0.005], rel=1e-4)


# precision


def test_updates_too_small_for_bf16_are_not_lost():
    """1000 steps of 1e-5 from 1.0, where neighbours in BF16 are 0.004 apart: BF16 alone would stay at 1 for ever."""
    model = a_model(torch.bfloat16)
    optimizer = Optimizer(model, replace(SETTINGS, learning_rate=1e-5), 1000)
    for _ in range(1000):
        update(optimizer, model, 1.0)
    assert model.weight.dtype == torch.bfloat16
    assert float(optimizer.masters[0][0, 0]) == pytest.approx(0.99, rel=1e-4)
    for parameter in model.parameters():
        assert parameter.flatten().tolist() == [float(torch.tensor(0.99).bfloat16())] * parameter.numel()


def test_gradients_of_micro_batches_add_up_in_fp32():
    """In BF16, 1 + 2^-9 is 1, however often."""
    model = a_model(torch.bfloat16)
    optimizer = Optimizer(model, SETTINGS, 10)
    metrics = update(optimizer, model, 1.0, *[2.0**-9] * 256)
    assert metrics["train/grad_norm"] == pytest.approx(1.5 * math.sqrt(6), rel=1e-6)


def test_fp32_weights_have_no_second_copy():
    model = a_model()
    optimizer = Optimizer(model, SETTINGS, 10)
    assert all(a is b for a, b in zip(optimizer.masters, model.parameters(), strict=True))
    assert update(optimizer, model, 1.0, 0.5)["train/grad_norm"] == pytest.approx(1.5 * math.sqrt(6))


@each_dtype
def test_no_gradient_is_left_for_the_next_update(dtype: torch.dtype):
    model = a_model(dtype)
    optimizer = Optimizer(model, SETTINGS, 10)
    for _ in range(2):
        assert update(optimizer, model, 1.0)["train/grad_norm"] == pytest.approx(math.sqrt(6))


@pytest.mark.parametrize("gradient", [1e-12, 1e-18])
def test_the_default_eps_lets_tiny_gradients_move_weights(gradient: float):
    """MiniMax-M1 saw gradients from 1e-18 to 1e-5; with PyTorch's eps of 1e-8 the step of 1e-12 would be 1e-4 of this."""
    model = a_model()
    eps = OptimizerSection().eps
    assert eps == 1e-15
    update(Optimizer(model, replace(SETTINGS, eps=eps), 10), model, gradient)
    moved = 1 - first(model)
    assert moved == pytest.approx(1e-2 * gradient / (gradient + eps), rel=1e-3, abs=1e-7)


# refusals


@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_norm_that_is_not_finite_is_refused_and_changes_nothing(dtype: torch.dtype, bad: float):
    model = a_model(dtype)
    optimizer = Optimizer(model, replace(SETTINGS, weight_decay=0.1, warmup_updates=5), 10)
    update(optimizer, model, 1.0)
    before = state(optimizer, model)
    with pytest.raises(
        NonFiniteError, match=rf"gradient norm of the policy is {bad} at update 1; the update was refused"
    ):
        update(optimizer, model, 1.0, bad)
    assert all(torch.equal(a, b) for a, b in zip(state(optimizer, model), before, strict=True))
    metrics = update(optimizer, model, 1.0)
    assert metrics["train/grad_norm"] == pytest.approx(math.sqrt(6))
    assert metrics["train/learning_rate"] == pytest.approx(2 / 5 * 1e-2)


# the rest of AdamW


@each_dtype
def test_weight_decay_spares_vectors(dtype: torch.dtype):
    model = a_model(dtype)
    optimizer = Optimizer(model, replace(SETTINGS, weight_decay=0.5), 10)
    update(optimizer, model, 0.0)
    matrix, vector = optimizer.masters
    assert matrix.flatten().tolist() == pytest.approx([1 - 1e-2 * 0.5] * 4)
    assert vector.tolist() == [1.0, 1.0]


def test_gradients_are_scaled_down_to_the_norm():
    """With eps 1 and no memory AdamW's step is lr · g / (|g| + 1), which shows the size of g."""
    settings = replace(SETTINGS, betas=(0.0, 0.0), eps=1.0, max_grad_norm=0.5 * math.sqrt(6))
    model = a_model()
    metrics = update(Optimizer(model, settings, 10), model, 3.0)
    assert metrics["train/grad_norm"] == pytest.approx(3 * math.sqrt(6))
    assert 1 - first(model) == pytest.approx(1e-2 * 0.5 / 1.5, rel=1e-4)
    model = a_model()
    update(Optimizer(model, replace(settings, max_grad_norm=100.0), 10), model, 3.0)
    assert 1 - first(model) == pytest.approx(1e-2 * 3 / 4, rel=1e-4)


@each_dtype
def test_frozen_weights_stay(dtype: torch.dtype):
    model = a_model(dtype)
    model.bias.requires_grad_(False)
    optimizer = Optimizer(model, replace(SETTINGS, weight_decay=0.5), 10)
    (model.weight.sum() + model.bias.sum()).backward()
    optimizer.collect_gradients()
    optimizer.step(optimizer.clip())
    assert model.bias.tolist() == [1.0, 1.0]
    assert first(model) < 1.0
