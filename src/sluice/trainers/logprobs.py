"""Log-probabilities of chosen tokens from hidden states, through the FP32 head, a chunk of tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24
"""Logits held at once: 64 MiB in FP32."""


def token_logprobs(
    model: Any, hidden: Tensor, target_ids: Tensor, temperatures: Tensor, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """[T, H], [T], [T] → log-probs [T] of the targets and entropies [T], both of softmax(logits / temperature).

    Entropies carry a gradient only where that is asked for.

    No [T, V] tensor of more than one chunk ever exists: the backward computes a chunk's logits again.
    """
    size = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
    weight = model.head.weight.float()
    if len(hidden) <= size or not torch.is_grad_enabled():
        parts = [
            _chunk(model, weight, entropy_gradient, *part) for part in _chunks(size, hidden, target_ids, temperatures)
        ]
    else:
        parts = [
            checkpoint(_chunk, model, weight, entropy_gradient, *part, use_reentrant=False)
            for part in _chunks(size, hidden, target_ids, temperatures)
        ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunks(size: int, *columns: Tensor) -> Any:
    return zip(*(column.split(size) for column in columns), strict=True)


def _chunk(
    model: Any, weight: Tensor, entropy_gradient: bool, hidden: Tensor, target_ids: Tensor, temperatures: Tensor
) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(model.logits(hidden, weight) / temperatures[:, None], dim=-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(1, target_ids[:, None])[:, 0], entropy
