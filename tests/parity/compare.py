"""Equality to the precision of the numbers, and how far apart they were."""

from __future__ import annotations

import torch
from torch import Tensor

from parity.ragged import Measured

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
LARGEST: dict[str, dict[str, float]] = {}
"""Per comparison and dtype, over all batches."""


def assert_equal(name: str, ours: Tensor, theirs: Tensor, scale: Tensor | None = None) -> None:
    """To the dtype's tolerance, relative to `scale`; left out, to the largest of their numbers."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert ours.isfinite().all()
    unit = float(theirs.abs().max() if scale is None else scale) or 1.0
    difference = float((ours - theirs).abs().max()) / unit
    figures = LARGEST.setdefault(name, {})
    dtype = str(ours.dtype).removeprefix("torch.")
    figures[dtype] = max(figures.get(dtype, 0.0), difference)
    assert difference <= TOLERANCES[ours.dtype], f"{name}: {difference:.3g} apart in {dtype}"


def assert_same_loss(name: str, ours: Measured, theirs: Measured) -> None:
    """The loss relative to the sum of its terms' sizes, since the terms may cancel."""
    assert_equal(name, ours.loss, theirs.loss, None if ours.terms is None else ours.terms.abs().sum())
    assert_equal(name, ours.gradient, theirs.gradient)
    if ours.terms is not None and theirs.terms is not None:
        assert_equal(name, ours.terms, theirs.terms)
