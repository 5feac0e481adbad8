"""Publication over the network, between GPUs or hosts: the trainer broadcasts its weights to a process of an engine.

Each process of an engine has a group of its own with the trainer, which ends with it: one that dies breaks no other's. They meet at a store
that the run's own process holds. Tensors travel in buckets of bounded size, so that neither end holds the weights twice.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from sluice.errors import EngineError, TrainingError, boundary
from sluice.interfaces import LanguageModel, Weights
from sluice.processes import Died
from sluice.weights.publication import WeightsMoved

dist: Any = torch.distributed  # its stores and groups have no types
BUCKET_BYTES = 2**26
"""What one broadcast holds at most."""
SENDER, RECEIVER = 0, 1
"""Ranks in a group."""
LAST_WORDS_S = 5.0
"""For the trainer to say what happened to it, when the engine has seen the connection break off."""
READY, GONE = b"ready", b"gone"
"""What an end says of itself in the store; the run's own process says the other for it."""


@dataclass(frozen=True)
class Address:
    """Where trainer and engine meet."""

    host: str
    port: int
    """Of the store."""
    engine: str
    process: int
    """Which process of this engine's; the group of another one is another."""
    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    """Names, shapes and dtypes of what is sent, in this order."""
    limit_s: float
    """Longest wait of either end for the other."""

    def store(self) -> Any:
        """The group's own part of it."""
        whole = dist.TCPStore(
            self.host, self.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=self.limit_s)
        )
        return dist.PrefixStore(f"{self.engine}/{self.process}", whole)


class Broadcast:
    """Publication to each engine for itself, without a copy of the weights: a process that was started while the trainer updates
    has to wait for the next ones."""

    fds = ()

    def __init__(self, weights: Iterable[tuple[str, Tensor]], *, limit_s: float, host: str = "127.0.0.1") -> None:
        """`weights` say what is published: names, shapes and dtypes. `host` is this one's address as trainer and engines see it."""
        self._tensors = tuple((name, tuple(t.shape), t.dtype) for name, t in weights)
        self._num_bytes = sum(t.nbytes for t in _like(self._tensors))
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, 0), family=family)
        self._port = listening.getsockname()[1]
        self._store: Any = dist.TCPStore(
            host, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        self._host, self._limit_s = host, limit_s
        self._processes = count()
        self._weights: Weights | None = None
        self.version: int | None = None

    def belongs_to(self, run: Path) -> None:
        """Nothing is left there."""

    async def publish(self, weights: Weights, version: int) -> int:
        self._weights, self.version = weights, version
        return self._num_bytes

    def link(self, engine: str) -> _BroadcastLink:
        address = Address(self._host, self._port, engine, next(self._processes), self._tensors, self._limit_s)
        return _BroadcastLink(BroadcastInlet(address), self)

    async def deliver(self, address: Address, version: int, take_over: Callable[[], Awaitable[object]]) -> None:
        assert self._weights is not None
        sending = asyncio.ensure_future(self._weights.broadcast(address, version))
        taking = asyncio.ensure_future(take_over())
        try:
            await asyncio.wait([sending, taking], return_when=asyncio.FIRST_EXCEPTION)
            if not (sending.done() and taking.done()):
                for end in ("trainer", "engine"):  # neither need wait for the other
                    self._store.set(f"{address.engine}/{address.process}/{version}/{end}", GONE)
                await asyncio.wait([taking])  # the process answers, or is ended at the limit
                await asyncio.wait([sending], timeout=LAST_WORDS_S)
            errors = [error for task in (taking, sending) if task.done() and (error := task.exception())]
            if errors:
                with boundary(
                    EngineError, f"the weights of version {version} could not be broadcast to {address.engine}"
                ):
                    raise _cause(errors)
        finally:
            for task in (sending, taking):
                task.cancel()  # a thread that waits for a process that has ended is left to its limit
            await asyncio.gather(sending, taking, return_exceptions=True)

    def close(self) -> None:
        self._store = None


@dataclass(frozen=True)
class _BroadcastLink:
    inlet: BroadcastInlet
    publication: Broadcast

    async def deliver(self, version: int, take_over: Callable[[], Awaitable[object]]) -> None:
        await self.publication.deliver(self.inlet.address, version, take_over)


class BroadcastInlet:
    """What the process of the engine holds."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._group: _Group | None = None

    def read(self, model: LanguageModel, version: int) -> None:
        weights = list(model.named_weights())
        own = tuple((name, tuple(t.shape), t.dtype) for name, t in weights)
        if own != self.address.tensors:
            raise EngineError(
                f"the engine's model has other weights than the trainer's: {_difference(own, self.address)}"
            )
        self._group = self._group or _Group(self.address, RECEIVER)
        self._group.meet(version, "engine", "trainer")
        with boundary(EngineError, f"the weights of version {version} broke off"):  # with the trainer's process
            self._group.join(model.device)
            self._group.receive(weights)


class Sender:
    """The trainer's end of all groups."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, int, str], _Group] = {}
        """Of the process that each engine has at present, by the address of the store and its name."""

    def send(self, address: Address, version: int, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
        """Blocks until the engine has them all. Raises EngineError when it is gone."""
        engine = address.host, address.port, address.engine
        group = self._groups.pop(engine, None)
        if group is None or group.address != address:
            group = _Group(address, SENDER)
        group.meet(version, "trainer", "engine")
        with boundary(EngineError, f"the weights of version {version} broke off"):  # with the engine's process
            group.join(device)
            group.send(weights)
        self._groups[engine] = group  # one that failed is not used again


class _Group:
    def __init__(self, address: Address, rank: int) -> None:
        self.address, self.rank = address, rank
        self.store = address.store()
        self._group: Any = None
        self._buffer: Tensor

    def meet(self, version: int, me: str, other: str) -> None:
        """Go on when the other end is there. Raises EngineError when it is said to be gone."""
        self.store.set(f"{version}/{me}", READY)
        if self.store.get(f"{version}/{other}") != READY:
            raise EngineError(f"the {other} was not there for the weights of version {version}")

    def join(self, device: torch.device) -> None:
        """The first time. By NCCL between two GPUs, else by gloo through the hosts' memory."""
        if self._group is not None:
            return
        mine = f"cuda {torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else "cpu"
        self.store.set(f"device/{self.rank}", mine)
        theirs = self.store.get(f"device/{1 - self.rank}").decode()
        limit = timedelta(seconds=self.address.limit_s)
        if mine != theirs and "cpu" not in (mine, theirs):
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            self._group = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", self.store), self.rank, 2, options)
            self._buffer = torch.empty(BUCKET_BYTES, dtype=torch.uint8, device=device)
            return
        options = dist.ProcessGroupGloo._Options()
        host = _own_address(self.address.host, self.address.port)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = limit
        self._group = dist.ProcessGroupGloo(dist.PrefixStore("gloo", self.store), self.rank, 2, options)
        self._buffer = torch.empty(BUCKET_BYTES, dtype=torch.uint8)

    @torch.no_grad()
    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for bucket in buckets(_bytes_of((name, weight.contiguous()) for name, weight in weights), BUCKET_BYTES):
            end = 0
            for part in bucket:
                start, end = end, end + len(part)
                self._buffer[start:end].copy_(part)
            self._broadcast(end)

    @torch.no_grad()
    def receive(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for bucket in buckets(_bytes_of(weights), BUCKET_BYTES):
            self._broadcast(sum(map(len, bucket)))
            end = 0
            for part in bucket:
                start, end = end, end + len(part)
                part.copy_(self._buffer[start:end])

    def _broadcast(self, num_bytes: int) -> None:
        self._group.broadcast(self._buffer[:num_bytes], SENDER).wait()
        if self._buffer.is_cuda:
            torch.cuda.current_stream(self._buffer.device).synchronize()  # `wait` is the stream's, not ours


def _cause(errors: list[BaseException]) -> BaseException:
    """What an end says of itself, if one does: the other only saw it break off."""
    of_itself = (error for kind in (WeightsMoved, Died, TrainingError) for error in errors if isinstance(error, kind))
    return next(of_itself, errors[0])


def buckets(parts: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """[n] bytes each → lists of at most `size` bytes in all, in the same order; a part that does not fit goes on in the next."""
    bucket: list[Tensor] = []
    room = size
    for part in parts:
        while len(part):
            bucket.append(part[:room])
            part, room = part[room:], room - len(bucket[-1])
            if not room:
                yield bucket
                bucket, room = [], size
    if bucket:
        yield bucket


def _bytes_of(weights: Iterable[tuple[str, Tensor]]) -> Iterator[Tensor]:
    """The memory of each tensor, in place. Raises ValueError for one that does not lie in one piece."""
    for name, weight in weights:
        if not weight.is_contiguous():
            raise ValueError(f"{name} does not lie in one piece of memory, and so cannot be received")
        yield weight.detach().view(-1).view(torch.uint8)


def _like(tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> Iterator[Tensor]:
    return (torch.empty(shape, dtype=dtype, device="meta") for _, shape, dtype in tensors)


def _own_address(host: str, port: int) -> str:
    """Of this machine, on the way to another."""
    with socket.create_connection((host, port)) as connection:
        return connection.getsockname()[0]


def _difference(own: tuple[Any, ...], address: Address) -> str:
    for mine, theirs in zip(own, address.tensors, strict=False):
        if mine != theirs:
            return f"{mine[0]} {list(mine[1])} {mine[2]}, and there {theirs[0]} {list(theirs[1])} {theirs[2]}"
    return f"{len(own)} tensors, and there {len(address.tensors)}"
