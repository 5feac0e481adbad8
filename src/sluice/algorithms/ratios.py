"""Importance ratios between the current policy and the one that sampled."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def log_ratios(
    level: Literal["token", "sequence"],
    logprobs: Tensor,
    old_logprobs: Tensor,
    loss_weights: Tensor,
    sequence_ids: Tensor,
) -> Tensor:
    """log r for each token, [T] → [T]; 0 where the loss weight is 0, whatever the log-probs there.

    token: log π(t) - log π_old(t). sequence: its mean over the sequence's own loss tokens, the same for all of
    them (GSPO, arXiv 2507.18071, eq. 7, with eq. 14's gradient: every token's log-prob carries 1/|o|).
    """
    own = loss_weights != 0
    # where, not a product: a masked token may have log-prob -inf, and 0 · inf is nan in the value and in the gradient
    difference = torch.where(own, logprobs, 0.0) - torch.where(own, old_logprobs, 0.0)
    if level == "token":
        return difference
    num = int(sequence_ids.max()) + 1 if len(sequence_ids) else 0
    count = torch.zeros(num, dtype=difference.dtype, device=difference.device).index_add(
        0, sequence_ids, own.to(difference.dtype)
    )
    total = torch.zeros_like(count).index_add(0, sequence_ids, difference)
    return torch.where(own, (total / count.clamp(min=1))[sequence_ids], 0.0)
