"""RMS norms of a model in few passes over memory: by torch's kernel on a GPU, and elsewhere with a gradient by formula, in half as
many passes as autograd makes of the model's own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _RMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x²) + eps) · w over the last dimension, in FP32 up to the product with w.

    With x̂ = x / sqrt(…) and g the gradient of y: that of w is Σ g · x̂, and that of x is (g · w - x̂ · mean(g · w · x̂)) / sqrt(…).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        g = gradients[0].float()
        normed = x * inverse
        seen = g * normed
        for_weight = seen.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = (seen @ weight.float())[..., None].div_(-x.shape[-1])
        for_x = torch.addcmul(g * weight, normed, mean).mul_(inverse).to(x.dtype)
        return for_x, for_weight, None


def _forward(module: Any, x: Tensor) -> Tensor:
    if x.is_cuda:
        return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
    return _RMSNorm.apply(x, module.weight, module.variance_epsilon)  # pyright: ignore[reportReturnType]


def _on_a_device(module: Any, generator: torch.Generator) -> Any:
    """The norm itself, or a copy with random weights of one that is on no device."""
    if not module.weight.is_meta:
        return module
    module = copy.deepcopy(module)
    weight = torch.rand(module.weight.shape, generator=generator).to(module.weight.dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


@torch.no_grad()
def use_own_norms(body: nn.Module) -> None:
    """Replace the forward of each RMS norm that computes the same on random numbers; others (Gemma's) stay as they are.

    That of the class and not of each module, or `torch.compile` would compile each layer by itself.
    """
    own: dict[type, type | None] = {}
    for module in body.modules():
        kind = type(module)
        if not (hasattr(module, "weight") and hasattr(module, "variance_epsilon")):
            continue
        if kind not in own:
            generator = torch.Generator().manual_seed(0)
            probe = _on_a_device(module, generator)
            x = torch.randn(5, len(probe.weight), generator=generator).to(probe.weight)
            tolerance = 1e-5 if x.dtype == torch.float32 else 1e-2  # how often they round differs
            same = torch.allclose(_forward(probe, x), probe(x), rtol=tolerance, atol=tolerance)
            own[kind] = type(kind.__name__, (kind,), {"forward": _forward}) if same else None
        if replacement := own[kind]:
            module.__class__ = replacement
