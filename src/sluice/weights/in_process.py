"""The handle to the weights of a trainer that has the whole model in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from sluice.interfaces import SharedMemory
from sluice.weights.broadcast import Sender
from sluice.weights.fingerprint import fingerprint
from sluice.weights.group import Address
from sluice.weights.publication import ReadWriteLock, WeightsMoved


class Updates:
    """Of a trainer's weights: how many there were. Each waits until other threads have sent the weights as they are."""

    def __init__(self) -> None:
        self.count = 0
        self.sender = Sender()
        self.lock = ReadWriteLock()

    @asynccontextmanager
    async def another(self) -> AsyncGenerator[None]:
        async with self.lock.written():
            self.count += 1
            yield


@dataclass(frozen=True)
class InProcessWeights:
    """A handle to the live model: an engine in the same process generates with the very tensors that the trainer updates."""

    model: Any
    updates: Updates = field(default_factory=Updates)
    count: int = 0
    """Updates that there were when the handle was made."""

    async def copy_to(self, shared: SharedMemory) -> None:
        shared.write(self.model.named_weights())

    async def save(self, folder: str, *, adapter: bool = False) -> None:
        write = (self.model.export_adapter if adapter else self.model.export)()
        await asyncio.to_thread(write, folder)

    async def fingerprint(self, version: int) -> str:
        async with self._unmoved(version):
            return await asyncio.to_thread(fingerprint, self.model.named_weights())

    async def broadcast(self, address: Address, version: int) -> None:
        async with self._unmoved(version):
            await asyncio.to_thread(
                self.updates.sender.send, address, version, self.model.named_weights(), self.model.device
            )

    @asynccontextmanager
    async def _unmoved(self, version: int) -> AsyncGenerator[None]:
        async with self.updates.lock.read():
            if self.updates.count != self.count:
                raise WeightsMoved(version)
            yield
