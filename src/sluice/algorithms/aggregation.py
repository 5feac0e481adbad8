"""Who divides by what: always by counts over the whole update, never by those of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Totals:
    """Counts over one optimiser update, known before its first backward."""

    loss_weight: float
    """Sum of the loss weights; the number of loss tokens where all are 1."""
    num_sequences: int
    """Sequences with a loss token; one that is masked throughout counts nowhere."""

    @classmethod
    def of(cls, loss_weights: Tensor, sequence_ids: Tensor) -> Totals:
        return cls(float(loss_weights.sum()), int(torch.unique(sequence_ids[loss_weights != 0]).numel()))


def token_coefficients(
    aggregation: Literal["token_mean", "sequence_mean", "constant"],
    loss_weights: Tensor,
    sequence_ids: Tensor,
    totals: Totals,
    loss_constant: float | None = None,
) -> Tensor:
    """c [T] such that the update's loss is the sum of c_t · L_t over all of its micro-batches.

    token_mean: w_t / Σ w (DAPO, arXiv 2503.14476, eq. 8; with weights, the token-weighted mean).
    sequence_mean: w_t / Σ of the sequence's w / number of sequences (GRPO, arXiv 2402.03300, eq. 3).
    constant: w_t / (number of sequences · constant) (Dr. GRPO, arXiv 2503.20783).
    A sequence must lie whole in one micro-batch.
    """
    if aggregation == "token_mean":
        return loss_weights / max(totals.loss_weight, 1e-30)
    if aggregation == "constant":
        assert loss_constant is not None
        return loss_weights / (max(totals.num_sequences, 1) * loss_constant)
    num = int(sequence_ids.max()) + 1 if len(sequence_ids) else 0
    per_sequence = torch.zeros(num, dtype=loss_weights.dtype, device=loss_weights.device).index_add(
        0, sequence_ids, loss_weights
    )
    divisor = torch.where(per_sequence == 0, 1.0, per_sequence)[sequence_ids]
    return loss_weights / divisor / max(totals.num_sequences, 1)
