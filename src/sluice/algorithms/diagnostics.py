"""What a step's numbers say about themselves."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sluice.tracking.metrics import EffectiveShare, Mean, Metrics

BIN_EDGES = (0.5, 0.8, 0.95, 1.05, 1.25, 2.0, 5.0)
_BINS = [
    f"{low}-{high}" if high else f"above_{low}" for low, high in zip(("0", *BIN_EDGES), (*BIN_EDGES, None), strict=True)
]


def ratio_metrics(name: str, ratios: Tensor, own: Tensor) -> Metrics:
    """Of the [T] ratios where `own`: effective sample size as a share of their number, (Σ r)² / (n · Σ r²) (Kong 1992), and a
    histogram, as the share of tokens in each bin."""
    count = own.sum()
    below = [torch.zeros_like(count), *(((ratios <= edge) & own).sum() for edge in BIN_EDGES), count]
    counted = torch.where(own, ratios, 0.0).double()
    return Metrics(
        {f"{name}/ess": EffectiveShare(count, counted.sum(), counted.square().sum())}
        | {
            f"{name}/share/{bin}": Mean(high - low, count)
            for bin, (low, high) in zip(_BINS, pairwise(below), strict=True)
        }
    )


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(G - V) / Var(G), both [T]: 1 for a perfect critic, 0 for a constant one; nan when all returns are equal."""
    if len(returns) < 2 or bool((returns == returns[0]).all()):
        return float("nan")
    return float(1 - (returns - values).var() / returns.var())
