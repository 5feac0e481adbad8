"""Whether sluice's loss and gradient are an oracle's, to the precision of the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from batches import Batch, loss_and_gradients
from torch import Tensor

from sluice.algorithms import Algorithm

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def compare(spec: Algorithm, objective: Callable[..., Any], batch: Batch, dtype: torch.dtype) -> None:
    """Loss, and gradient to log-probs and entropies, against those of J."""
    responses, logprobs, entropies = batch.responses()
    loss = -torch.as_tensor(objective(responses) if responses else 0.0, dtype=torch.float64)
    output, to_logprobs, to_entropies = loss_and_gradients(spec, batch.to(dtype))
    tolerance = TOLERANCES[dtype]
    assert output.loss.dtype == dtype
    # the error of a sum is that of its terms, which may cancel
    scale = 1 + float((output.per_token.abs() * batch.loss_weights).sum())
    assert float(output.loss) == pytest.approx(oracle.sg(loss), rel=tolerance, abs=tolerance * scale)
    for actual, leaves in ((to_logprobs, logprobs), (to_entropies, entropies)):
        expected = gradient(loss, leaves)
        largest = float(expected.abs().max())
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * largest)


def gradient(loss: Tensor, leaves: list[Tensor]) -> Tensor:
    """Of a loss in which some leaves or all may have no part: with every token clipped it is a constant."""
    if not loss.requires_grad:
        return torch.zeros(len(leaves), dtype=torch.float64)
    found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    return torch.stack([torch.zeros((), dtype=torch.float64) if g is None else g for g in found])
