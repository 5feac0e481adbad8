"""RMS norms by formula are the model's own, and so are their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models import CONFIGS, tiny_model
from sluice.trainers import norms as norms_of
from sluice.trainers.norms import _RMSNorm


@pytest.mark.parametrize("shape", [(7, 32), (2, 3, 5, 32)])
def test_values_and_gradients_are_those_of_the_formula(shape: tuple[int, ...]) -> None:
    """In float64, by autograd through x / sqrt(mean(x²) + eps) · w."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator), torch.randn(32, generator=generator)
    upstream = torch.randn(shape, generator=generator)
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = exact_x / (exact_x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * exact_weight
    expected.backward(upstream.double())
    x.requires_grad_()
    weight.requires_grad_()
    actual: Any = _RMSNorm.apply(x, weight, 1e-2)
    actual.backward(upstream)
    for found, wanted in ((actual, expected), (x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        assert (found.detach().double() - wanted.detach()).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_norms_that_compute_the_same_are_replaced(architecture: str, dtype: torch.dtype) -> None:
    body = tiny_model(architecture, dtype).body
    norms = [m for m in body.modules() if "Norm" in type(m).__name__]
    assert norms
    replaced = [type(module).__module__ == norms_of.__name__ for module in norms]
    assert replaced == [architecture not in ("gemma2", "gemma3", "gpt2")] * len(norms)


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8)
    output: Any = _RMSNorm.apply(x, weight, 1e-6)
    output.sum().backward()
    assert weight.grad is None
    assert x.grad is not None
