"""Equality to the precision of the numbers, and how far apart they were."""

from __future__ import annotations

import torch
from torch import Tensor

from parity.ragged import Measured

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
LARGEST: dict[str, dict[str, float]] = {}
"""Per comparison and dtype, over all batches."""


def assert_equal(name: str, ours: Tensor, theirs: Tensor) -> None:
    """To the dtype's tolerance, of the largest number or of 1."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert ours.isfinite().all()
    difference = float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))
    figures = LARGEST.setdefault(name, {})
    dtype = str(ours.dtype).removeprefix("torch.")
    figures[dtype] = max(figures.get(dtype, 0.0), difference)
    assert difference <= TOLERANCES[ours.dtype], f"{name}: {difference:.3g} apart in {dtype}"


def assert_same_loss(name: str, ours: Measured, theirs: Measured) -> None:
    assert_equal(name, ours.loss, theirs.loss)
    assert_equal(name, ours.gradient, theirs.gradient)
    if ours.terms is not None and theirs.terms is not None:
        assert_equal(name, ours.terms, theirs.terms)
