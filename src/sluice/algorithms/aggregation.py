"""Who divides by what: always by counts over the whole update, never by those of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sluice.algorithms.spec import Algorithm

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor of counts or sums over data-parallel ranks."""


def one_rank(statistics: Tensor) -> Tensor:
    return statistics


def sums_by(ids: Tensor, values: Tensor) -> Tensor:
    """[T] values and the id of each, from 0 → the sum of each id's values."""
    num = int(ids.max()) + 1 if len(ids) else 0
    return torch.zeros(num, dtype=values.dtype, device=values.device).index_add(0, ids, values)


def token_coefficients(
    spec: Algorithm,
    loss_weights: Tensor,
    sequence_ids: Tensor,
    group_ids: Tensor | None = None,
    reduce: Reduce = one_rank,
) -> Tensor:
    """c [T] such that the update's loss is the sum of c_t · L_t over all of its micro-batches and ranks.

    All are [T] and of one whole update (or of a rank's share of it: no sequence and no group lies on two ranks).
    `group_ids` are for prompt_mean. Ids are any whole numbers. With w the loss weights:
    token_mean: w_t / Σ w (DAPO, arXiv 2503.14476, eq. 8, over the batch; with weights, the token-weighted mean).
    sequence_mean: w_t / Σ of the sequence's w / number of sequences (GRPO, arXiv 2402.03300, eq. 3).
    prompt_mean: w_t / Σ of the group's w / number of groups (DAPO, eq. 8, as an expectation over prompts).
    constant: w_t / (number of sequences · constant) (Dr. GRPO, arXiv 2503.20783).
    blend: token_share · token_mean + (1 - token_share) · sequence_mean (MiniMax-M1, arXiv 2506.13585, section 5, which
    combines the two and gives no formula).
    Sequences and groups without a loss token count nowhere.
    """
    if spec.aggregation == "token_mean":
        return _mean(loss_weights, reduce)
    if spec.aggregation == "sequence_mean":
        return _mean_of_means(loss_weights, sequence_ids, reduce)
    if spec.aggregation == "prompt_mean":
        if group_ids is None:
            raise ValueError("aggregation prompt_mean needs group_ids")
        return _mean_of_means(loss_weights, group_ids, reduce)
    if spec.aggregation == "constant":
        if spec.loss_constant is None:
            raise ValueError("aggregation constant needs a loss_constant: resolve the row, or replace it in the row")
        own = torch.unique(sequence_ids[loss_weights != 0])
        num = reduce(torch.tensor(float(len(own)), dtype=loss_weights.dtype, device=loss_weights.device))
        return loss_weights / (num.clamp(min=1) * spec.loss_constant)
    assert spec.token_share is not None
    per_token, per_sequence = _mean(loss_weights, reduce), _mean_of_means(loss_weights, sequence_ids, reduce)
    return spec.token_share * per_token + (1 - spec.token_share) * per_sequence


def _mean(loss_weights: Tensor, reduce: Reduce) -> Tensor:
    total = reduce(loss_weights.sum())
    return loss_weights / torch.where(total == 0, 1.0, total)


def _mean_of_means(loss_weights: Tensor, ids: Tensor, reduce: Reduce) -> Tensor:
    _, ids = torch.unique(ids, return_inverse=True)
    totals = sums_by(ids, loss_weights)
    num = reduce((totals != 0).sum().to(loss_weights.dtype))
    return loss_weights / torch.where(totals == 0, 1.0, totals)[ids] / num.clamp(min=1)
