"""Publication to other processes of this machine: the trainer copies its weights into memory that they see too."""

from __future__ import annotations

import asyncio
import mmap
import os
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from sluice.interfaces import Weights

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
            weakref.finalize(self, os.close, self.fd)
        memory = torch.frombuffer(mmap.mmap(self.fd, self.num_bytes), dtype=torch.uint8)
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


class PublishedWeights:
    """The weights that were published last, in one memory for all engines of this machine that take them from there."""

    def __init__(self, like: Iterable[tuple[str, Tensor]]) -> None:
        """`like` says what is published: tensors of these names, shapes and dtypes, whose numbers do not matter yet."""
        self.memory = SharedWeights(like)
        self._version = -1
        self._writing = asyncio.Lock()

    async def publish(self, weights: Weights, version: int) -> None:
        """Copied once, whichever engine comes first."""
        async with self._writing:
            if self._version != version:
                self._version = version
                await weights.copy_to(self.memory)

    async def version(self) -> int:
        """Of what is there as a whole. Who has read it and asks again knows whether others were written meanwhile."""
        async with self._writing:
            return self._version
