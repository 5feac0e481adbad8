"""Estimators of the divergence from a reference policy, one number per sampled token."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_estimates(estimator: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[T], [T] → [T] estimates of KL(π || π_ref) from tokens that π sampled; with d = log π - log π_ref:

    k1: d. k2: d² / 2. k3: exp(-d) - 1 + d, which is never negative (Schulman 2020, "Approximating KL Divergence").
    k1_st, k3_st: the value of k1 or k3 with the gradient of k2, which is that of the KL itself on fresh samples, while
    that of k1 is 0 on average and that of k3 is that of KL(π_ref || π) (Tang & Munos, arXiv 2506.09477, section 3).
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    k2 = d.square() / 2
    if estimator == "k2":
        return k2
    if estimator == "k3":
        return torch.expm1(-d) + d
    value = kl_estimates(estimator.removesuffix("_st"), logprobs, ref_logprobs)
    return k2 + (value - k2).detach()
