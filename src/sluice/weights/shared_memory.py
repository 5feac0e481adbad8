"""Publication to other processes of this machine: the trainer copies its weights into memory that they see too."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable

import torch
from torch import Tensor

_ALIGNMENT = 64


class SharedWeights:
    """Room for named tensors in memory without a name, which goes when the last process that sees it goes.

    Whoever has its file descriptor, and tensors of the same names, shapes and dtypes in the same order, sees the same numbers.
    """

    def __init__(self, like: Iterable[tuple[str, Tensor]], fd: int | None = None) -> None:
        """With an `fd`, what another process has made."""
        named = list(like)
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for _, tensor in named]
        self.num_bytes = sum(sizes)
        self.fd = os.memfd_create("sluice weights") if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, self.num_bytes)
        self._memory = mmap.mmap(self.fd, self.num_bytes)
        memory = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._tensors = {
            name: part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for (name, tensor), part in zip(named, memory.split(sizes), strict=True)
        }

    @torch.no_grad()
    def write(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            self._tensors[name].copy_(weight)

    @torch.no_grad()
    def read(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            weight.copy_(self._tensors[name])

    def part(self, start: int, length: int) -> bytes:
        """A copy of so many of the bytes, or of as many as there are from `start` on."""
        return self._memory[start : start + length]

    def fill(self, start: int, part: bytes) -> None:
        self._memory[start : start + len(part)] = part

    def close(self) -> None:
        """The memory stays as long as a tensor of it does."""
        os.close(self.fd)
