"""How the embedded engine computes the next token's hidden states: through the model's own forward, or, where the model is
built like a llama, through a copy of its weights that is laid out for one token per sequence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from sluice.engines.graphs import GraphedDecoder
from sluice.engines.packed import PackedDecoder, is_llama_like
from sluice.engines.slots import Prefix, SlotCache, Span
from sluice.engines.threads import StepThreads
from sluice.interfaces import LanguageModel


class Decoder(Protocol):
    @property
    def key_order(self) -> Tensor | None:
        """In which order it keeps the elements of a key; None: as the model does."""
        ...

    by_token: bool
    """Whether its cache lies token by token in memory."""
    largest_product: int
    """Multiplications per token in the largest matrix product of a step."""
    span_cost: float
    """Time of a cached position of one sequence, over that of one more span."""

    def hidden(self, tokens: Tensor, positions: Tensor, cache: SlotCache, spans: list[Span]) -> Tensor:
        """[n], [n] → [n, H]: the last hidden states after one more token in each of the first n slots."""
        ...

    def refresh(self) -> None:
        """Take over the model's weights as they are now."""
        ...

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """What it decodes with, under the model's names."""
        ...


class ModelDecoder:
    """Any model, through its own forward."""

    key_order = None
    by_token = False
    span_cost = 0.0  # one span for all: the model's forward has one mask

    def __init__(self, model: LanguageModel, threads: StepThreads) -> None:
        self.model, self.threads = model, threads
        self.largest_product = max(weight.numel() for _, weight in model.named_weights())

    def hidden(self, tokens: Tensor, positions: Tensor, cache: SlotCache, spans: list[Span]) -> Tensor:
        length = spans[0].length
        visible = torch.arange(length, device=positions.device)[None, None] <= positions[:, None, None]
        view = _ModelCache(cache, positions, length)
        with self.threads.work(len(tokens) * self.largest_product):
            return self.model.hidden_states(tokens[:, None], positions[:, None], visible, view)[:, 0]

    def refresh(self) -> None:
        pass

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        return self.model.named_weights()


class _ModelCache:
    """A slot cache as a transformers model calls it."""

    def __init__(self, cache: SlotCache, positions: Tensor, length: int) -> None:
        self.cache, self.positions, self.length = cache, positions, length
        self.rows = torch.arange(len(positions), device=positions.device)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        n = len(self.rows)
        self.cache.write(layer_idx, self.rows, self.positions, keys[:, :, 0], values[:, :, 0])
        stored = self.cache.keys[layer_idx][:n, :, :, : self.length].mT
        return stored.contiguous(), self.cache.values[layer_idx][:n, :, : self.length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length - 1


def decoder_for(model: LanguageModel, threads: StepThreads) -> Decoder:
    """The fastest that computes what the model does; which, is tried."""
    if is_llama_like(model):
        packed = PackedDecoder(model, threads)
        if _agrees(packed, model):
            return GraphedDecoder(packed) if model.device.type == "cuda" else packed
    return ModelDecoder(model, threads)


@torch.inference_mode()
def _agrees(decoder: Decoder, model: LanguageModel) -> bool:
    """Three random sequences of uneven lengths, one token after the other, against the model's own forward of the whole."""
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (3, 9), generator=generator).to(model.device)
    positions = torch.arange(9, device=model.device).expand(3, 9)
    lengths = [2, 5, 3]
    prompts = DynamicCache()
    expected = model.hidden_states(ids, positions, cache=prompts)
    cache = SlotCache(decoder.by_token)
    for row, length in enumerate(lengths):
        prefix = Prefix(prompts, row, length, expected[row, 0], decoder.key_order)
        cache.reserve(prefix, 3, 9, 9)
        cache.fill(slice(row, row + 1), prefix)
    rows, at = torch.arange(3), torch.tensor(lengths)
    tolerance = (1e-3 if model.dtype == torch.float32 else 0.1) * max(1.0, float(expected.abs().max()))
    for step in range(4):
        now = (at + step).to(model.device)
        found = decoder.hidden(ids[rows, now], now, cache, [Span(0, 3, int(now.max()) + 1)])
        if not float((found - expected[rows, now]).abs().max()) <= tolerance:
            return False
    return True
