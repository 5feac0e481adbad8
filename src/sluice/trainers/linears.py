"""FP32 products of a model's linear layers by oneDNN, on CPUs on which it is faster than what torch takes by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sluice.cpu import onednn_linear, product_library


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b. With g the gradient of y: that of x is g W, that of W is gᵀ x, and that of b is Σ g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        g = gradients[0]
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = g.flatten(0, -2)
        return (
            onednn_linear(g, weight.t()) if needs_x else None,
            onednn_linear(rows.t(), x.flatten(0, -2).t()) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def _is_plain(tensor: Tensor) -> bool:
    """Not a part of one that other ranks have the rest of."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.compiler.is_compiling() or not (_is_plain(x) and _is_plain(self.weight)):
            return F.linear(x, self.weight, self.bias)
        return _Linear.apply(x, self.weight, self.bias)  # pyright: ignore[reportReturnType]


def use_fast_linears(body: nn.Module) -> None:
    """Replace the forward of each linear layer, if that is faster here."""
    if product_library() != "onednn":
        return
    for module in body.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
