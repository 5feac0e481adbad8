"""Attention of a decode step: one query per sequence over what its slot holds of keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sluice.engines.slots import Span
from sluice.engines.threads import StepThreads

Attention = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]
"""Queries [n, heads, d], keys and values of a layer's cache, its window → [n, heads · d]."""

POSITIONS_PER_SPAN = 1500
"""Cached positions (of one sequence and key head) that take as long as the operations of one more span: 30 µs on a CPU."""
_SMALL_PRODUCTS = 8
"""How much longer a multiplication takes in attention, whose products are many and small, than in a large one."""


class Products:
    """Attention of one step by batched products, span by span."""

    def __init__(
        self, positions: Tensor, spans: list[Span], kv_heads: int, scaling: float, threads: StepThreads
    ) -> None:
        self.positions, self.spans = positions, spans
        self.kv_heads, self.scaling, self.threads = kv_heads, scaling, threads
        self.masks: dict[int | None, list[Tensor]] = {}

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        if window not in self.masks:
            self.masks[window] = [self._mask(span, window, queries.dtype) for span in self.spans]
        if len(self.spans) == 1:
            return self._attended(queries, keys, values, self.spans[0], self.masks[window][0])
        seen = [
            self._attended(queries[span.start : span.stop], keys, values, span, mask)
            for span, mask in zip(self.spans, self.masks[window], strict=True)
        ]
        return torch.cat(seen)

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span, mask: Tensor) -> Tensor:
        """Query heads that share a key head are the rows of one product."""
        n, heads, head_dim = queries.shape
        q = queries.reshape(n * self.kv_heads, -1, head_dim)
        k = keys[span.start : span.stop, :, :, : span.length].flatten(0, 1)
        v = values[span.start : span.stop, :, : span.length].flatten(0, 1)
        with self.threads.work(_SMALL_PRODUCTS * 2 * n * heads * span.length * head_dim):
            scores = torch.baddbmm(mask, q, k, alpha=self.scaling)
            return torch.bmm(torch.softmax(scores, -1, torch.float32).to(v.dtype), v).view(n, -1)

    def _mask(self, span: Span, window: int | None, dtype: torch.dtype) -> Tensor:
        """[n · kv heads, 1, length]: 0 where a cached position is seen, -inf where not."""
        at = self.positions[span.start : span.stop, None]
        keys = torch.arange(span.length, device=at.device)
        hidden = keys > at
        if window is not None:
            hidden |= keys <= at - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=at.device).masked_fill_(hidden, -torch.inf)
        return mask.repeat_interleave(self.kv_heads, 0)[:, None]


class Kernel:
    """Attention of one step by the FlashAttention kernel that torch brings, which reads of each slot what is used of it."""

    def __init__(self, positions: Tensor, capacity: int, scaling: float) -> None:
        n, device = len(positions), positions.device
        self.scaling, self.capacity = scaling, capacity
        self.lengths = (positions + 1).int()
        self.queries_at = torch.arange(n + 1, dtype=torch.int32, device=device)
        self.slots_at = self.queries_at * self.capacity

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        # the operator itself: torch's function around it takes lengths in later versions only
        seen: Tensor = torch.ops.aten._flash_attention_forward(
            queries,
            keys.permute(0, 3, 1, 2).flatten(0, 1),
            values.permute(0, 2, 1, 3).flatten(0, 1),
            self.queries_at,
            self.slots_at,
            1,
            self.capacity,
            0.0,
            False,
            False,
            scale=self.scaling,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
            seqused_k=self.lengths,
        )[0]
        return seen.flatten(1)
