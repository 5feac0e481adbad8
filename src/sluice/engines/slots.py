"""The key-value cache and the per-sequence state of the embedded engine, in slots that are reused at once.

Active sequences always fill slots 0 … n - 1: the last one moves into the place of one that finished. So a decode
step works on views of the first n slots, without gathering.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SlotCache:
    """Keys and values [num_slots, heads, capacity, head size] per layer, in the form a transformers model calls.

    Both dimensions grow when they are needed, so that short tasks do not pay for a long window.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.positions = torch.empty(0, dtype=torch.int64)
        self.visible_length = 0

    def reserve(self, prefix: Prefix, num_slots: int, length: int) -> None:
        """Make room for `num_slots` sequences of `length` tokens shaped like `prefix`."""
        if not self.keys:
            self.keys = [k.new_zeros(0, k.shape[0], 0, k.shape[2]) for k in prefix.keys]
            self.values = [v.new_zeros(0, v.shape[0], 0, v.shape[2]) for v in prefix.values]
        slots, _, capacity, _ = self.keys[0].shape
        if num_slots > slots or length > capacity:
            slots, capacity = max(num_slots, slots), max(-(-length // 64) * 64, capacity)
            for caches in (self.keys, self.values):
                for layer, cache in enumerate(caches):  # one at a time, so that only one stands twice
                    caches[layer] = _grown(cache, slots, capacity)

    def fill(self, slots: slice, prefix: Prefix) -> None:
        """Copy a prompt's keys and values into several slots."""
        for cache, new in zip((*self.keys, *self.values), (*prefix.keys, *prefix.values), strict=True):
            cache[slots, :, : prefix.length] = new

    def move(self, source: int, target: int, length: int) -> None:
        for cache in (*self.keys, *self.values):
            cache[target, :, :length] = cache[source, :, :length]

    def at(self, positions: Tensor, visible_length: int) -> SlotCache:
        """Set where the next token of each of the first len(positions) slots goes."""
        self.positions, self.visible_length = positions, visible_length
        return self

    # -- what a transformers model calls --

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        n = len(self.positions)
        rows = torch.arange(n, device=keys.device)
        stored = []
        for cache, new in ((self.keys[layer_idx], keys), (self.values[layer_idx], values)):
            cache[rows, :, self.positions] = new[:, :, 0]
            stored.append(cache[:n, :, : self.visible_length])
        return stored[0], stored[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.visible_length - 1


class Prefix:
    """A prompt, computed once for all samples of its group: keys and values per layer, and the last hidden state."""

    def __init__(self, cache: Any, row: int, length: int, hidden: Tensor) -> None:
        self.length = length
        self.keys = [layer.keys[row, :, :length] for layer in cache.layers]
        self.values = [layer.values[row, :, :length] for layer in cache.layers]
        self.hidden = hidden  # [H]


class SlotState:
    """One row per slot of everything that sampling needs, as tensors."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.columns: dict[str, Tensor] = {}
        self.width = 0

    def reserve(self, num_slots: int, width: int) -> None:
        """Room for `num_slots` sequences of `width` new tokens."""
        if self.columns and num_slots <= len(self["count"]) and width <= self.width:
            return
        old, self.width = self.columns, max(width, self.width)
        kinds = {"last": torch.int64, "position": torch.int64, "count": torch.int64, "limit": torch.int64}
        kinds |= {"top_k": torch.int64, "stop_row": torch.int64, "temperature": torch.float32, "top_p": torch.float32}
        wide = {"uniform": torch.float32, "tokens": torch.int64, "logprobs": torch.float32}
        self.columns = {k: torch.zeros(num_slots, dtype=d, device=self.device) for k, d in kinds.items()}
        self.columns |= {k: torch.zeros(num_slots, self.width, dtype=d, device=self.device) for k, d in wide.items()}
        for name, values in old.items():
            target = self.columns[name]
            (target[: len(values), : values.shape[1]] if values.dim() == 2 else target[: len(values)]).copy_(values)

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def move(self, source: int, target: int) -> None:
        for column in self.columns.values():
            column[target] = column[source]


def _grown(cache: Tensor, slots: int, capacity: int) -> Tensor:
    grown = cache.new_zeros(slots, cache.shape[1], capacity, cache.shape[3])
    grown[: cache.shape[0], :, : cache.shape[2]] = cache
    return grown
