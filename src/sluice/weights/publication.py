"""How weights get from the trainer to engines with models of their own: what each of the ways offers.

A publication is the trainer's side. It makes a link for each process of an engine, and the inlet of the link is what that process holds.
"""

from __future__ import annotations

import asyncio
import pickle
from base64 import b64decode
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sluice.errors import EngineError
from sluice.interfaces import LanguageModel, Weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor


PUBLISH_LIMIT_S = 600.0
"""For an engine to take weights over, and for their fingerprint."""


class WeightsMoved(EngineError):
    """They are no longer those that were published; the next publication brings others."""

    def __init__(self, version: int) -> None:
        super().__init__(f"the weights of version {version} are gone: the trainer is making the next ones")


class Inlet(Protocol):
    """Goes to the process of an engine, by pickle."""

    def read(self, model: LanguageModel, version: int) -> None:
        """Put the weights of this version into a model; may block. What it raises ends the process, unless it is a SluiceError."""
        ...


class Stream(Inlet, Protocol):
    """One that servers have use for too, which are other programs: each worker of one has it, by pickle."""

    def tensors(self, version: int, device: torch.device, receiver: int) -> Iterator[tuple[str, Tensor]]:
        """The weights of this version, one after the other, for the worker of that number. Raises EngineError before the first one
        when they do not come."""
        ...

    def shapes(self, version: int) -> Iterator[tuple[str, Iterable[int]]]:
        """Of those, known before they come."""
        ...

    def make_way(self, inlet: Stream) -> None:
        """For the next one. Raises EngineError when that is another run's and this one's is known to go on."""
        ...


class Source:
    """What a server's worker takes weights through: the inlet that it was given last."""

    def __init__(self) -> None:
        self._pickled = ""
        self._inlet: Stream | None = None

    def inlet(self, pickled: str) -> Stream:
        """The same one for the same words, with the group that it is in. Raises EngineError when another run publishes to this worker."""
        if self._inlet is None or pickled != self._pickled:
            inlet: Stream = pickle.loads(b64decode(pickled))
            if self._inlet:
                self._inlet.make_way(inlet)
            self._pickled, self._inlet = pickled, inlet
        return self._inlet

    def drop(self) -> None:
        """With the connections of its group, so that nobody waits for this worker."""
        self._inlet = None


class Link(Protocol):
    """With one process of an engine, as long as it lives."""

    @property
    def inlet(self) -> Inlet: ...

    async def deliver(self, version: int, take_over: Callable[[], Awaitable[object]]) -> None:
        """While `take_over` has the process read its inlet. Raises WeightsMoved when the trainer has gone on, and what `take_over`
        raises."""
        ...


class Publication(Protocol):
    """One serves several engines."""

    fds: tuple[int, ...]
    """What their processes inherit."""
    version: int | None
    """Of what links deliver; None before anything was published."""

    def belongs_to(self, run: Path) -> None:
        """It is that of a run with this folder; told before anything is published."""
        ...

    async def publish(self, weights: Weights, version: int) -> int:
        """Take these over: they are what links deliver from now on. Says how many bytes are moved for it; for a version that all engines read
        in one place, 0 but for the first of them."""
        ...

    def link(self, engine: str) -> Link:
        """With the process that the engine of this name has from now on."""
        ...

    def close(self) -> None: ...


class ReadWriteLock:
    """Around weights that the trainer leaves for others to read: they are written while nobody reads them."""

    def __init__(self) -> None:
        self._open = asyncio.Lock()
        self._num_readers = 0
        self._no_readers = asyncio.Event()
        self._no_readers.set()

    @asynccontextmanager
    async def read(self) -> AsyncGenerator[None]:
        async with self._open:  # after whoever waits to write
            self._num_readers += 1
            self._no_readers.clear()
        try:
            yield
        finally:
            self._num_readers -= 1
            if not self._num_readers:
                self._no_readers.set()

    @asynccontextmanager
    async def written(self) -> AsyncGenerator[None]:
        async with self._open:
            await self._no_readers.wait()
            yield
