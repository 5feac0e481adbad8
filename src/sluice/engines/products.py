"""The matrix products of a decode step.

MKL brings a weight into an order of its own at every product, which for some tens of sequences takes as long as the product.
Where torch has MKL that is done once, when the weights are new.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sluice.engines.threads import StepThreads

FEWEST_ROWS = 4
"""Of fewer rows each is multiplied as a vector, for which nothing is put in order."""
_ROWS = 64
"""MKL asks for how many rows a weight is ordered. The order is the same for all, which `tests/engines/test_products.py` sees."""


def is_ordered(weight: Tensor) -> bool:
    """Whether MKL will multiply by it."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkl.is_available()


class Product:
    """[n, K] → [n, N] by a weight [N, K]."""

    def __init__(self, weight: Tensor, threads: StepThreads) -> None:
        self.weight, self.threads = weight, threads
        self._ordered: Any = None

    @torch.no_grad()
    def refresh(self) -> None:
        """The weight has changed."""
        if is_ordered(self.weight):
            self._ordered = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, _ROWS)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        with self.threads.product(len(x), self.weight.numel()):
            if self._ordered is None or len(x) < FEWEST_ROWS:
                return F.linear(x, self.weight, bias)
            return torch.ops.mkl._mkl_linear(x, self._ordered, self.weight, bias, len(x))

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        if self._ordered is None or len(x) < FEWEST_ROWS:
            with self.threads.product(len(x), self.weight.numel()):
                return torch.addmm(residual, x, self.weight.t())
        return self(x).add_(residual)
