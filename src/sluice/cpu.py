"""Which library multiplies matrices in FP32 on this CPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch


@cache
def product_library() -> Literal["mkl", "onednn"] | None:
    """MKL, which torch takes by itself, has its fastest code for Intel's processors only; oneDNN has the same for AMD's: on an EPYC with
    AVX-512 it is 2 to 3 times as fast. None: what torch takes is left to it."""
    try:
        is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # another system
        is_amd = False
    if is_amd and torch.backends.mkldnn.is_available():
        return "onednn"
    return "mkl" if torch.backends.mkl.is_available() else None
