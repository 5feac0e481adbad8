"""Publication without a copy: the engine generates with the very tensors that the trainer updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class InProcessWeights:
    """A handle to the live model; the engine checks that it is its own."""

    model: Any
