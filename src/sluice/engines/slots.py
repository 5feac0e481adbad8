"""The key-value cache and the per-sequence state of the embedded engine, in slots that are reused at once.

Active sequences always fill slots 0 … n - 1: the last one moves into the place of one that finished. So a decode
step works on views of the first n slots, without gathering.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sluice.engines.routed import as_entries


class SlotCache:
    """Keys [num_slots, heads, head size, capacity] and values [num_slots, heads, capacity, head size] per layer.

    Keys lie transposed: the product with one query per sequence then runs along memory, which is faster
    on a CPU. With `by_token` the shapes are the same, and memory runs token by token ([num_slots, capacity, heads, head size]),
    as fused kernels want it. Both dimensions grow with what is in use, so that short completions do not pay for a long window.
    """

    def __init__(self, by_token: bool = False) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._orders = ((0, 3, 1, 2), (0, 2, 1, 3)) if by_token else ((0, 1, 2, 3), (0, 1, 2, 3))
        """In which order the dimensions of keys and of values follow each other in memory."""

    @property
    def capacity(self) -> int:
        return self.values[0].shape[2] if self.values else 0

    def reserve(self, prefix: Prefix, num_slots: int, length: int, limit: int) -> None:
        """Make room for `num_slots` sequences of `length` tokens, which become `limit` at most, shaped like `prefix`."""
        if not self.values:
            self.keys = [k.new_zeros(0, *k.shape[:2], 0) for k in prefix.keys]
            self.values = [v.new_zeros(0, v.shape[0], 0, v.shape[2]) for v in prefix.values]
        if num_slots > len(self.values[0]) or length > self.capacity:
            slots = num_slots if length > self.capacity else max(num_slots, len(self.values[0]))
            self._resize(slots, self.capacity_for(length, limit))

    def grow(self, length: int, limit: int, num_slots: int) -> None:
        """Make room for sequences of `length` tokens, in `num_slots` slots from now on."""
        if length > self.capacity:
            self._resize(num_slots, self.capacity_for(length, limit))

    def capacity_for(self, length: int, limit: int) -> int:
        """For `length` tokens and half as many again, so that growing copies little; never a multiple of 512 bytes, at which
        the rows of a cache would compete for the same places of the processor's."""
        return max(self.capacity, -(-min(length * 3 // 2, limit) // 64) * 64 + 16)

    def _resize(self, slots: int, capacity: int) -> None:
        for layer in range(len(self.keys)):  # one at a time, so that only one stands twice
            self.keys[layer] = _grown(self.keys[layer], slots, 3, capacity, self._orders[0])
            self.values[layer] = _grown(self.values[layer], slots, 2, capacity, self._orders[1])

    def fill(self, slots: slice, prefix: Prefix) -> None:
        """Copy a prompt's keys and values into several slots."""
        for cache, new in zip(self.keys, prefix.keys, strict=True):
            cache[slots, :, :, : prefix.length] = new
        for cache, new in zip(self.values, prefix.values, strict=True):
            cache[slots, :, : prefix.length] = new

    def write(self, layer: int, rows: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put the keys and values ([n, heads, head size]) of one token into each of the first n slots."""
        self.keys[layer][rows, :, :, positions] = keys
        self.values[layer][rows, :, positions] = values

    def move(self, source: int, target: int, length: int) -> None:
        for cache in self.keys:
            cache[target, :, :, :length] = cache[source, :, :, :length]
        for cache in self.values:
            cache[target, :, :length] = cache[source, :, :length]

    def reorder(self, order: Tensor, length: int) -> None:
        """Slot i takes what slot order[i] holds."""
        for cache in self.keys:
            cache[: len(order), :, :, :length] = cache[order, :, :, :length]
        for cache in self.values:
            cache[: len(order), :, :length] = cache[order, :, :length]


class Prefix:
    """A prompt, computed once for all samples of its group: keys and values per layer, and the last hidden state."""

    def __init__(
        self,
        cache: Any,
        row: int,
        length: int,
        hidden: Tensor,
        key_order: Tensor | None,
        routed: Tensor | None = None,
    ) -> None:
        """`key_order` is the order in which the decoder keeps the elements of a key; None: that of the model. `routed`
        [length, layers · k] are the experts that its tokens took."""
        self.length = length
        self.keys = [layer.keys[row, :, :length].mT for layer in cache.layers]  # [heads, head size, length]
        if key_order is not None:
            self.keys = [keys[:, key_order] for keys in self.keys]
        self.values = [layer.values[row, :, :length] for layer in cache.layers]  # [heads, length, head size]
        self.hidden = hidden  # [H]
        self.routed_experts = [] if routed is None else as_entries(routed.cpu().numpy(), length)

    @property
    def position_bytes(self) -> int:
        """What a token takes in the cache."""
        return sum(x.nbytes for x in (*self.keys, *self.values)) // self.length


@dataclass(frozen=True)
class Span:
    """Slots that attend over the same number of cached positions."""

    start: int
    stop: int
    length: int


def spans(lengths: list[int], cost: float) -> list[Span]:
    """Cut the slots, whose sequences have these lengths, where attending over the longest of fewer saves time.

    `cost` is the time that a cached position of one sequence takes, over that of one more span; 0 makes it one span.
    """
    found: list[Span] = []
    for start in range(0, len(lengths), 8):
        stop = min(start + 8, len(lengths))
        span = Span(start, stop, max(lengths[start:stop]))
        while found:
            last = found[-1]
            length = max(last.length, span.length)
            wasted = (length - last.length) * (last.stop - last.start) + (length - span.length) * (stop - span.start)
            if cost * wasted > 1:
                break
            span = Span(found.pop().start, stop, length)
        found.append(span)
    return found


class SlotState:
    """One row per slot of everything that sampling needs, as tensors."""

    def __init__(self, device: torch.device, num_routed: int) -> None:
        """`num_routed` experts are noted of each token; 0 for none."""
        self.device = device
        self.num_routed = num_routed
        self.columns: dict[str, Tensor] = {}
        self.width = 0

    def reserve(self, num_slots: int, width: int) -> None:
        """Room for `num_slots` sequences of `width` new tokens."""
        if self.columns and num_slots <= len(self["count"]) and width <= self.width:
            return
        num_slots = max(num_slots, len(self.columns["count"]) if self.columns else 0)
        old, self.width = self.columns, max(width, self.width)
        kinds = dict.fromkeys(("last", "position", "count", "limit", "top_k", "stop_row"), torch.int64)
        kinds |= {"temperature": torch.float32, "top_p": torch.float32}
        kinds |= dict.fromkeys(("greedy", "stopped", "done"), torch.bool)
        wide = {"uniform": torch.float32, "tokens": torch.int64, "logprobs": torch.float32}
        self.columns = {k: torch.zeros(num_slots, dtype=d, device=self.device) for k, d in kinds.items()}
        # one more than there are tokens: what a sequence that is done is given until its slot is free
        self.columns |= {
            k: torch.zeros(num_slots, self.width + 1, dtype=d, device=self.device) for k, d in wide.items()
        }
        if self.num_routed:
            shape = (num_slots, self.width + 1, self.num_routed)
            self.columns["routed"] = torch.zeros(shape, dtype=torch.int16, device=self.device)
        for name, values in old.items():
            target = self.columns[name]
            (target[: len(values), : values.shape[1]] if values.dim() > 1 else target[: len(values)]).copy_(values)

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def move(self, source: int, target: int) -> None:
        for column in self.columns.values():
            column[target] = column[source]

    def reorder(self, order: Tensor) -> None:
        """Slot i takes what slot order[i] holds."""
        for column in self.columns.values():
            column[: len(order)] = column[order]


def _grown(cache: Tensor, slots: int, dim: int, capacity: int, order: tuple[int, ...]) -> Tensor:
    shape = list(cache.shape)
    shape[0], shape[dim] = slots, capacity
    grown = cache.new_zeros([shape[i] for i in order]).permute([order.index(i) for i in range(4)])
    kept = min(slots, len(cache))
    grown[:kept].narrow(dim, 0, cache.shape[dim]).copy_(cache[:kept])
    return grown
