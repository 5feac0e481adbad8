"""What engines say of the experts that a mixture of experts took, as a completion has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray


def as_entries(routed: NDArray[Any], length: int) -> list[bytes]:
    """[n, layers, k] of the first of `length` tokens."""
    rows = routed.reshape(len(routed), prod(routed.shape[1:])).astype("<u2")
    return [*(row.tobytes() for row in rows), *[b""] * (length - len(rows))]


@dataclass(frozen=True)
class Routed:
    """What a server is to report of each token."""

    num_layers: int
    """Of the model; servers speak of all layers."""
    layers: Sequence[int]
    """Those that have experts."""
    top_k: int
    num_experts: int

    def entries(self, numbers: NDArray[Any] | None, length: int) -> list[bytes]:
        """Of a server's answer for a sequence of so many tokens, the last of which it was not fed. Raises ValueError for one that cannot
        be what routers chose."""
        if numbers is None:
            raise ValueError(
                "it does not say which experts it took; it has to be started with --enable-return-routed-experts"
            )
        wanted = (length - 1, self.num_layers, self.top_k)
        if numbers.size != prod(wanted):
            raise ValueError(f"it tells {numbers.size} experts, and (tokens, layers, experts each) are {wanted}")
        chosen = numbers.reshape(wanted)[:, list(self.layers)]
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < self.num_experts):
            raise ValueError(f"it tells experts {chosen.min()} to {chosen.max()}, and a layer has {self.num_experts}")
        if (np.diff(np.sort(chosen, -1), axis=-1) == 0).any():
            raise ValueError("it tells the same expert twice for a token in a layer; its kernels may not note them")
        return as_entries(chosen, length)
