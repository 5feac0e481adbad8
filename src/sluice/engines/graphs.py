"""Decode steps as CUDA graphs: a GPU runs a step of a small batch faster than Python can launch its hundreds of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sluice.engines.packed import PackedDecoder
from sluice.engines.slots import SlotCache, Span


@dataclass
class _Step:
    """A step of one shape: where its inputs go, what runs it, and where its output is found."""

    tokens: Tensor
    positions: Tensor
    run: Callable[[], object]
    hidden: Tensor


class GraphedDecoder:
    """A packed decoder whose steps are rounded up to few shapes, each captured once and then replayed.

    The rows beyond the active ones compute something that nobody looks at, in slots that nobody has.
    """

    span_cost = 0.0  # one span for all, since every cut would be another graph

    def __init__(self, packed: PackedDecoder) -> None:
        self.packed = packed
        self.key_order, self.by_token = packed.key_order, packed.by_token
        self.largest_product = packed.largest_product
        self._steps: dict[tuple[int, int], _Step] = {}
        self._lies_at: list[tuple[int, torch.Size]] = []
        """Where the cache is that the graphs read; another one wants other graphs."""

    def refresh(self) -> None:
        self.packed.refresh()  # in place, so the graphs see it

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        return self.packed.named_weights()

    def hidden(self, tokens: Tensor, positions: Tensor, cache: SlotCache, spans: list[Span]) -> Tensor:
        lies_at = [(x.data_ptr(), x.shape) for x in (*cache.keys, *cache.values)]
        if self._lies_at != lies_at:
            self._steps.clear()
            self._lies_at = lies_at
        n = len(tokens)
        num = min(1 << (n - 1).bit_length(), len(cache.values[0]))
        # the kernel reads where each sequence ends, so one graph does for all lengths
        length = cache.capacity if self.by_token else min(rounded(spans[0].length, 128), cache.capacity)
        step = self._steps.get((num, length))
        if step is None:
            inputs = tokens.new_zeros(num), positions.new_zeros(num)
            inputs[0][:n], inputs[1][:n] = tokens, positions
            step = self._steps[num, length] = self._captured(*inputs, cache, length)
        step.tokens[:n], step.positions[:n] = tokens, positions
        step.positions[n:] = 0  # where least is attended over
        step.run()
        return step.hidden[:n].clone()  # the next step writes there

    def _captured(self, tokens: Tensor, positions: Tensor, cache: SlotCache, length: int) -> _Step:
        def work() -> Tensor:
            return self.packed.hidden(tokens, positions, cache, [Span(0, len(tokens), length)])

        if tokens.device.type != "cuda":  # the same shapes without a graph, which shows that they are right
            hidden = work()
            return _Step(tokens, positions, lambda: hidden.copy_(work()), hidden)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # a rehearsal: what libraries and the decoder make once is made before the capture
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = work()
        return _Step(tokens, positions, graph.replay, hidden)


def rounded(number: int, least: int) -> int:
    """Up to the next of 2ⁿ and 1.5 · 2ⁿ from `least` on: at most half as much again, in few steps."""
    size = least
    while size < number:
        if size * 3 // 2 >= number:
            return size * 3 // 2
        size *= 2
    return size
