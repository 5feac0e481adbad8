"""Fields of many samples as one array, so that no check walks over tokens in Python."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.types import Sample

Array = NDArray[Any]


def column(samples: Sequence[Sample], field: str, dtype: type = float) -> Array:
    """[tokens] of all samples, one sample after the other."""
    rows = [getattr(sample, field) for sample in samples]
    return np.fromiter(chain.from_iterable(rows), dtype, sum(map(len, rows)))


def totals(values: Array, samples: Sequence[Sample]) -> Array:
    """[samples] the sums of each one's tokens."""
    owners = np.repeat(np.arange(len(samples)), [len(sample) for sample in samples])
    return np.bincount(owners, values, len(samples))


def place(samples: Sequence[Sample], position: int) -> str:
    """Sample and token at a position of a column, for messages."""
    for sample in samples:
        if position < len(sample):
            return f"sample {sample.name}, token {position}"
        position -= len(sample)
    raise IndexError(position)


def first(wrong: Array) -> int | None:
    """Where the first True is."""
    at = int(wrong.argmax()) if len(wrong) else 0
    return at if len(wrong) and wrong[at] else None
