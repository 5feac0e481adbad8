"""Linear layers by oneDNN are the plain ones, and so are their gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sluice.trainers import linears
from sluice.trainers.linears import Linear, use_fast_linears

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")


def gradients(layer: nn.Module, x: Tensor, seen: Tensor) -> list[Tensor]:
    """Output, and gradients of the inputs and of each parameter."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * seen).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]  # type: ignore[list-item]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 33), (1, 1000)])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (37, 100), (128, 1)])
def test_it_is_the_product_in_float64_and_its_gradient(
    inputs: int, outputs: int, shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(linears, "product_library", lambda: "onednn")
    generator = torch.Generator().manual_seed(0)
    body = nn.Sequential(nn.Linear(inputs, outputs, bias=bias))
    exact = copy.deepcopy(body).double()
    use_fast_linears(body)
    assert type(body[0]) is Linear
    x = torch.randn(*shape, inputs, generator=generator)
    seen = torch.randn(*shape, outputs, generator=generator)
    for ours, theirs in zip(gradients(body, x, seen), gradients(exact, x.double(), seen.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_what_is_frozen_has_no_gradient_and_other_dtypes_are_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linears, "product_library", lambda: "onednn")
    body = nn.Sequential(nn.Linear(8, 4))
    use_fast_linears(body)
    body.requires_grad_(False)
    assert len(gradients(body, torch.randn(3, 8), torch.randn(3, 4))) == 2
    body.double()
    torch.testing.assert_close(
        body(torch.ones(2, 8).double()), torch.nn.functional.linear(torch.ones(2, 8).double(), *body[0].parameters())
    )


def test_where_mkl_is_fast_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linears, "product_library", lambda: "mkl")
    body = nn.Sequential(nn.Linear(8, 4))
    use_fast_linears(body)
    assert type(body[0]) is nn.Linear
