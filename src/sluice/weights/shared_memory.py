"""Publication to other processes of this machine: the trainer copies its weights into memory that they see too."""

from __future__ import annotations

import mmap
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sluice.interfaces import LanguageModel, Weights
from sluice.weights.publication import ReadWriteLock

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

    def close(self) -> None:
        """The memory stays as long as a tensor of it does."""
        os.close(self.fd)


class SharedMemory:
    """Publication to engines of this machine, which all read one copy."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """`weights` say what is published: names, shapes and dtypes; the numbers do not matter yet."""
        self._shared = SharedWeights(weights)
        self.fds: tuple[int, ...] = (self._shared.fd,)
        self._lock = ReadWriteLock()
        self.version: int | None = None

    def belongs_to(self, run: Path) -> None:
        """Nothing is left there."""

    async def publish(self, weights: Weights, version: int) -> int:
        async with self._lock.written():
            if version == self.version:
                return 0
            await weights.copy_to(self._shared)
            self.version = version
            return self._shared.num_bytes

    def link(self, engine: str) -> _SharedLink:
        return _SharedLink(SharedInlet(self._shared.fd), self._lock)

    def close(self) -> None:
        if self.fds:
            self._shared.close()
        self.fds = ()


@dataclass(frozen=True)
class _SharedLink:
    inlet: SharedInlet
    lock: ReadWriteLock

    async def deliver(self, version: int, take_over: Callable[[], Awaitable[object]]) -> None:
        async with self.lock.read():
            await take_over()


class SharedInlet:
    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._shared: SharedWeights | None = None

    def read(self, model: LanguageModel, version: int) -> None:
        self._shared = self._shared or SharedWeights(model.named_weights(), self.fd)
        self._shared.read(model.named_weights())
