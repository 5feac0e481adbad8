"""The matrix products of a decode step.

A library for them brings a weight into an order of its own at every product, which for some tens of sequences takes as long as the
product. That is done once, when the weights are new.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sluice.cpu import onednn_linear, product_library
from sluice.engines.threads import StepThreads

FEWEST_ROWS = {"mkl": 4, "onednn": 1}
"""Of fewer rows each is multiplied as a vector, for which nothing is put in order."""
_ROWS = 64
"""For how many rows a weight is ordered. The order is the same for all, which `tests/engines/test_products.py` sees."""


def is_ordered(weight: Tensor) -> bool:
    """Whether it is put in order before it is multiplied by."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and product_library() is not None


def in_onednn_order(weight: Tensor) -> Tensor:
    """A weight [N, K] in oneDNN's order, where oneDNN multiplies by it; elsewhere as it is."""
    if is_ordered(weight) and product_library() == "onednn":
        return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return weight


class Product:
    """[n, K] → [n, N] by a weight [N, K]."""

    def __init__(self, weight: Tensor, threads: StepThreads) -> None:
        self.weight, self.threads = weight, threads
        self._ordered: Any = None

    @torch.no_grad()
    def refresh(self) -> None:
        """The weight has changed."""
        if not is_ordered(self.weight):
            return
        if product_library() == "mkl":
            self._ordered = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, _ROWS)
        else:
            self._ordered = in_onednn_order(self.weight)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        with self.threads.product(len(x), self.weight.numel()):
            if self._is_plain(x):
                return F.linear(x, self.weight, bias)
            if product_library() == "mkl":
                return torch.ops.mkl._mkl_linear(x, self._ordered, self.weight, bias, len(x))
            return onednn_linear(x, self._ordered, bias)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        if self._is_plain(x):
            with self.threads.product(len(x), self.weight.numel()):
                return torch.addmm(residual, x, self.weight.t())
        return self(x).add_(residual)

    def _is_plain(self, x: Tensor) -> bool:
        return self._ordered is None or len(x) < FEWEST_ROWS[product_library() or "mkl"]
