"""Publication over the network, between GPUs or hosts: the trainer broadcasts its weights to the processes of an engine.

Each process of an embedded engine, and each server, has a group of its own with the trainer, which ends with it: one that dies breaks
no other's. They meet at a store that the run's own process holds.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sluice.errors import EngineError, TrainingError, boundary
from sluice.interfaces import LanguageModel, Weights
from sluice.processes import Died
from sluice.weights.group import GONE, SENDER, Address, Group, Workers, dist
from sluice.weights.publication import Stream, WeightsMoved
from sluice.weights.server_group import ServerGroup, ServerInlet

LAST_WORDS_S = 5.0
"""For the trainer to say what happened to it, when the engine has seen the connection break off."""


class Broadcast:
    """Publication to each engine for itself, without a copy of the weights: a process that was started while the trainer updates
    has to wait for the next ones."""

    fds = ()
    folder = None

    def __init__(self, weights: Iterable[tuple[str, Tensor]], *, limit_s: float, host: str = "127.0.0.1") -> None:
        """`weights` say what is published: names, shapes and dtypes. `host` is this one's address as trainer and engines see it."""
        self._tensors = tuple((name, tuple(t.shape), t.dtype) for name, t in weights)
        self._num_bytes = sum(t.nbytes for t in _like(self._tensors))
        self._port: int
        self._store: Any
        self._store, self._port = _new_store(host)
        self._host, self._limit_s = host, limit_s
        self._processes = count()
        self._weights: Weights | None = None
        self.version: int | None = None

    def belongs_to(self, run: Path) -> None:
        """Nothing is left there."""

    async def publish(self, weights: Weights, version: int) -> int:
        self._weights, self.version = weights, version
        return self._num_bytes

    def link(self, engine: str, receivers: int = 1) -> BroadcastLink[BroadcastInlet]:
        return BroadcastLink(BroadcastInlet(self._address(engine, receivers)), self)

    def server_link(self, engine: str, receivers: int, device: str) -> BroadcastLink[ServerInlet]:
        """With receivers that have no code of ours; they are on `cuda` or `cpu`."""
        rendezvous, port = _new_store(self._host)
        address = replace(self._address(engine, receivers), workers=Workers(port, device))
        return BroadcastLink(ServerInlet(address, rendezvous), self)

    def _address(self, engine: str, receivers: int) -> Address:
        process = next(self._processes)
        return Address(self._host, self._port, engine, process, receivers, self._tensors, self._limit_s)

    async def deliver(
        self, inlet: BroadcastInlet | ServerInlet, version: int, take_over: Callable[[], Awaitable[object]]
    ) -> None:
        address = inlet.address
        for rank in address.ranks:  # what was said when this version was broken off before
            self._store.delete_key(f"{address.prefix()}/{version}/{rank}")
        sending = asyncio.ensure_future(self._send(address, version))
        taking = asyncio.ensure_future(take_over())
        try:
            await asyncio.wait([sending, taking], return_when=asyncio.FIRST_EXCEPTION)
            if not (sending.done() and taking.done()):
                self._break_off(inlet, version)
                await asyncio.wait([taking])  # the process answers, or is ended at the limit
                await asyncio.wait([sending], timeout=LAST_WORDS_S)
            errors = [error for task in (taking, sending) if task.done() and (error := task.exception())]
            if errors:
                raise _cause(errors)
        finally:
            if not (sending.done() and taking.done()):  # this was cancelled
                self._break_off(inlet, version)
            for task in (sending, taking):
                task.cancel()  # a thread that waits for a process that has ended is left to its limit
            await asyncio.gather(sending, taking, return_exceptions=True)

    def _break_off(self, inlet: BroadcastInlet | ServerInlet, version: int) -> None:
        """No end need wait for another."""
        for rank in inlet.address.ranks if self._store else ():  # else it was closed, which all ends see
            self._store.set(f"{inlet.address.prefix()}/{version}/{rank}", GONE)
        if isinstance(inlet, ServerInlet):
            inlet.break_off()

    async def _send(self, address: Address, version: int) -> None:
        assert self._weights is not None
        with boundary(EngineError, f"the weights of version {version} could not be broadcast to {address.engine}"):
            await self._weights.broadcast(address, version)

    async def fingerprint(self, version: int) -> str:
        """As that of `Disk`."""
        assert self._weights is not None
        if version != self.version:
            raise WeightsMoved(version)
        return await self._weights.fingerprint(version)

    def close(self) -> None:
        self._store = None


AnyInlet = TypeVar("AnyInlet", "BroadcastInlet", ServerInlet)


@dataclass(frozen=True)
class BroadcastLink(Generic[AnyInlet]):
    inlet: AnyInlet
    publication: Broadcast

    async def deliver(self, version: int, take_over: Callable[[], Awaitable[object]]) -> None:
        await self.publication.deliver(self.inlet, version, take_over)


class BroadcastInlet:
    """What the process of the engine holds, or each worker of a server."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._group: Group | None = None

    def read(self, model: LanguageModel, version: int) -> None:
        weights = list(model.named_weights())
        own = tuple((name, tuple(t.shape), t.dtype) for name, t in weights)
        if own != self.address.tensors:
            raise EngineError(
                f"the engine's model has other weights than the trainer's: {_difference(own, self.address)}"
            )
        group = self._met(version, model.device, receiver=0)
        with _told(version):
            group.join(model.device)
            for _ in group.receive(weights):
                pass

    def tensors(self, version: int, device: torch.device, receiver: int) -> Iterator[tuple[str, Tensor]]:
        return self._received(self._met(version, device, receiver), version, device)

    def shapes(self, version: int) -> Iterator[tuple[str, Iterable[int]]]:
        return ((name, shape) for name, shape, _ in self.address.tensors)

    def make_way(self, inlet: Stream) -> None:
        is_of_run = isinstance(inlet, BroadcastInlet) and inlet.address.run == self.address.run
        if not is_of_run and self._group and self._group.has_run():
            host, port = self.address.run
            raise EngineError(
                f"another run publishes its weights to this server, from {host} (port {port}); wait for its end or end it, or use a server "
                "of its own for each run"
            )

    def _met(self, version: int, device: torch.device, receiver: int) -> Group:
        self._group = self._group or Group(self.address, 1 + receiver)
        self._group.meet(version, device)
        return self._group

    def _received(self, group: Group, version: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        with _told(version):
            group.join(device)
            yield from group.received(device)


class Sender:
    """The trainer's end of all groups."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, int, str], Group] = {}
        """Of the process that each engine has at present, by the address of the store and its name."""

    def send(self, address: Address, version: int, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
        """Blocks until the engine has them all. Raises EngineError when it is gone."""
        engine = address.host, address.port, address.engine
        group = self._groups.pop(engine, None)
        with _told(version):
            if group is None or group.address != address:
                group = ServerGroup(address, device) if address.workers else Group(address, SENDER)
            group.meet(version, device)
            group.join(device)
            group.send(weights)
        self._groups[engine] = group  # one that failed is not used again


def _new_store(host: str) -> tuple[Any, int]:
    """Held by this process, and its port."""
    listening = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listening.getsockname()[1]
    store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    return store, port


def _told(version: int) -> AbstractContextManager[None]:
    """Around what the other end breaks off when it dies."""
    return boundary(EngineError, f"the weights of version {version} broke off")


def _cause(errors: list[BaseException]) -> BaseException:
    """What an end says of itself, if one does: the other only saw it break off."""
    of_itself = (error for kind in (WeightsMoved, Died, TrainingError) for error in errors if isinstance(error, kind))
    return next(of_itself, errors[0])


def _like(tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> Iterator[Tensor]:
    return (torch.empty(shape, dtype=dtype, device="meta") for _, shape, dtype in tensors)


def _difference(own: tuple[Any, ...], address: Address) -> str:
    for mine, theirs in zip(own, address.tensors, strict=False):
        if mine != theirs:
            return f"{mine[0]} {list(mine[1])} {mine[2]}, and there {theirs[0]} {list(theirs[1])} {theirs[2]}"
    return f"{len(own)} tensors, and there {len(address.tensors)}"
