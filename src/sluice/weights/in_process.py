"""Publication by a trainer that has the whole model in this process."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from sluice.interfaces import SharedMemory


@dataclass(frozen=True)
class InProcessWeights:
    """A handle to the live model: an engine in the same process generates with the very tensors that the trainer updates."""

    model: Any

    async def copy_to(self, shared: SharedMemory) -> None:
        shared.write(self.model.named_weights())

    async def save(self, folder: str) -> None:
        await asyncio.to_thread(self.model.export(), folder)
