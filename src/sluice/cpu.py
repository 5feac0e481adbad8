"""Which library multiplies matrices in FP32 on this CPU, and the products of the one that torch does not take by itself."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor


@cache
def product_library() -> Literal["mkl", "onednn"] | None:
    """MKL, which torch takes by itself, has its fastest code for Intel's processors only; oneDNN has the same for AMD's.
    None: what torch takes is left to it."""
    try:
        is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # another system
        is_amd = False
    if is_amd and torch.backends.mkldnn.is_available():
        return "onednn"
    return "mkl" if torch.backends.mkl.is_available() else None


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., K] by [N, K], transposed or not, or in oneDNN's own order, → [..., N]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
