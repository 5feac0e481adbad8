"""Log-probabilities of chosen tokens from hidden states, through the FP32 head, a chunk of tokens at a time.

As the sampler drew them: at its temperature, and with top-p or top-k over the ids that it kept. Without the latter the
ratio would be of two distributions over different sets (the keep sampling mask of DeepSeek-V3.2, arXiv 2512.02556).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24
"""Logits held at once: 64 MiB in FP32."""


def token_logprobs(
    model: Any,
    hidden: Tensor,
    target_ids: Tensor,
    temperatures: Tensor,
    kept_ids: Tensor | None = None,
    kept_counts: Tensor | None = None,
    *,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """[T, H], [T], [T] → log-probs [T] of the targets and entropies [T], both of softmax(logits / temperature).

    With `kept_ids` (flat) and `kept_counts` [T], both are of that softmax over the kept ids only; a count of 0 keeps all.
    Entropies carry a gradient only where that is asked for.

    No [T, V] tensor of more than one chunk ever exists: the backward computes a chunk's logits again.
    """
    size = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
    weight = model.head.weight.float()
    chunks: Any = zip(*(column.split(size) for column in (hidden, target_ids, temperatures)), strict=True)
    if kept_ids is not None and kept_counts is not None and len(kept_ids):
        counts = kept_counts.split(size)
        ids = kept_ids.split(torch.stack([part.sum() for part in counts]).tolist())
        chunks = ((*chunk, *kept) for chunk, *kept in zip(chunks, ids, counts, strict=True))
    if len(hidden) <= size or not torch.is_grad_enabled():
        parts = [_chunk(model, weight, entropy_gradient, *chunk) for chunk in chunks]
    else:
        parts = [checkpoint(_chunk, model, weight, entropy_gradient, *chunk, use_reentrant=False) for chunk in chunks]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk(
    model: Any,
    weight: Tensor,
    entropy_gradient: bool,
    hidden: Tensor,
    target_ids: Tensor,
    temperatures: Tensor,
    kept_ids: Tensor | None = None,
    kept_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    logits = model.logits(hidden, weight) / temperatures[:, None]
    dropped = None
    if kept_ids is not None and kept_counts is not None:
        dropped = _dropped(logits.shape, kept_ids, kept_counts)
        logits = logits.masked_fill(dropped, -torch.inf)
    logp = torch.log_softmax(logits, dim=-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        finite = logp if dropped is None else logp.masked_fill(dropped, 0.0)  # 0 · -inf would be no number
        entropy = -(logp.exp() * finite).sum(-1)
    return logp.gather(1, target_ids[:, None])[:, 0], entropy


def _dropped(shape: torch.Size, kept_ids: Tensor, kept_counts: Tensor) -> Tensor:
    """[T, V] which ids are not among those kept for the token."""
    rows = torch.arange(shape[0], device=kept_ids.device).repeat_interleave(kept_counts, output_size=len(kept_ids))
    dropped = (kept_counts > 0)[:, None].repeat(1, shape[1])
    dropped[rows, kept_ids] = False
    return dropped
