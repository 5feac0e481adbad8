"""The processes between which weights are broadcast: the trainer's, and those of one engine. Tensors travel in buckets of bounded size, so that
neither end holds the weights twice.
"""

from __future__ import annotations

import pickle
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from operator import methodcaller
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from sluice.errors import EngineError

dist: Any = torch.distributed  # its stores and groups have no types
BUCKET_BYTES = 2**26
"""What one broadcast holds at most."""
SENDER = 0
"""The trainer's rank in a group."""
GONE = b"gone"
"""What the run's own process says in the store in the place of each rank, when one end is."""
LOOK_S = 1.0
"""After which an end that waits for gloo looks whether it is waited for."""
JOIN_LIMIT_S = 60.0
"""For ends that have met to connect."""
ANSWER_LIMIT_S = 5.0
"""For the store of a run that goes on."""
_DEVICE_OF_HANDLE = 6
"""Which argument of `rebuild_cuda_tensor` is the number of the GPU, which another process may count otherwise."""


@dataclass(frozen=True)
class Workers:
    """Of a server, which have no code of ours and join by torch's own means."""

    port: int
    """Of a store of their own, where they meet the trainer."""
    device: str
    """`cuda` or `cpu`."""


@dataclass(frozen=True)
class Address:
    """Where trainer and engine meet."""

    host: str
    port: int
    """Of the store."""
    engine: str
    process: int
    """Which process, or server, of this engine's; the group of another one is another."""
    receivers: int
    """Processes that take the weights, each all of them: more than one where a server has several workers."""
    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    """Names, shapes and dtypes of what is sent, in this order."""
    limit_s: float
    """Longest wait of either end for the other."""
    workers: Workers | None = None
    """Where the receivers are of another make."""

    @property
    def ranks(self) -> range:
        return range(1 + self.receivers)

    @property
    def run(self) -> tuple[str, int]:
        """Which one it is, among those that go on."""
        return self.host, self.port

    def prefix(self) -> str:
        """Of the group's own part of the store."""
        return f"{self.engine}/{self.process}"

    def store(self) -> Any:
        return dist.PrefixStore(self.prefix(), self.store_at(self.port))

    def store_at(self, port: int) -> Any:
        limit = timedelta(seconds=self.limit_s)
        return dist.TCPStore(self.host, port, is_master=False, wait_for_workers=False, timeout=limit)


class Group:
    """One process's part in it."""

    def __init__(self, address: Address, rank: int) -> None:
        self.address, self.rank = address, rank
        self.store = address.store()
        self._token = secrets.token_hex(8)  # another one in its place has another
        self.store.set(self._token, b"")
        self._version = -1
        self._there: list[str] = []
        """What the others said when the wire was named."""
        self._wire_name = ""
        self._wire: _Wire | None = None

    def meet(self, version: int, device: torch.device) -> None:
        """Go on when the other end is there. Raises EngineError when it is said to be gone."""
        self._version = version
        if self.rank == SENDER:
            there = [self._said(rank) for rank in self.address.ranks[1:]]
            name = self._wire_name if there == self._there else f"{_way(device, there)}-{secrets.token_hex(8)}"
            self._there = there
            self.store.set(f"{version}/{SENDER}", name)
        else:
            self.store.set(f"{version}/{self.rank}", f"{self._token} {_named(device)}")
            name = self._said(SENDER)
        if name != self._wire_name:  # one of them is another one than before
            self._wire_name, self._wire = name, None

    def _said(self, rank: int) -> str:
        said = self.store.get(f"{self._version}/{rank}")
        if said in (GONE, b""):  # nothing, where it was deleted for the next try
            end = "trainer" if rank == SENDER else "engine"
            raise EngineError(f"the {end} was not there for the weights of version {self._version}")
        return said.decode()

    def join(self, device: torch.device) -> None:
        """The first time, and when an end is another one than before; every rank has to."""
        self._wire = self._wire or self._joined(device)

    def _joined(self, device: torch.device) -> _Wire:
        store, way = dist.PrefixStore(self._wire_name, self.store), self._wire_name.partition("-")[0]
        if way == "nccl":
            bucket = torch.empty(BUCKET_BYTES, dtype=torch.uint8, device=device)
            return _Collective(self.nccl(store), bucket, methodcaller("wait"))
        gloo = self.gloo(store, min(JOIN_LIMIT_S, self.address.limit_s))
        if way == "gloo":
            return _Collective(gloo, torch.empty(BUCKET_BYTES, dtype=torch.uint8), partial(self.finish, gloo))
        return _OneMemory(gloo, self._bucket_of_all(store, device), self.rank == SENDER, partial(self.finish, gloo))

    def finish(self, gloo: Any, work: Any) -> None:
        """Wait for a collective, at most to gloo's limit. Gloo does not notice every death of another end, so the store is asked now and then.
        Raises EngineError when an end is said to be gone, and the store's own error when the run's own process is."""
        while True:
            with suppress(RuntimeError):  # it goes on, or has failed
                work.wait(timedelta(seconds=LOOK_S))
            if work.is_completed():
                work.wait()
                return
            try:
                self._check_awaited()
            except BaseException:  # gloo's threads go on to its limit, and whoever drops the group waits for them
                threading.Thread(target=_drop, args=(gloo, work), daemon=True).start()
                raise

    def _check_awaited(self) -> None:
        if self.store.get(f"{self._version}/{self.rank}") == GONE:
            raise EngineError(f"the other end was gone before the weights of version {self._version} had arrived")

    def has_run(self) -> bool:
        """Whether the run's own process is there."""
        try:
            self.store.wait([self._token], timedelta(seconds=ANSWER_LIMIT_S))
        except RuntimeError:
            return False
        return True

    def nccl(self, store: Any) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self.address.limit_s)
        return dist.ProcessGroupNCCL(store, self.rank, len(self.address.ranks), options)

    def gloo(self, store: Any, join_limit_s: float) -> Any:
        options = dist.ProcessGroupGloo._Options()
        host = _own_address(self.address.host, self.address.port)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=join_limit_s)
        try:
            made = dist.ProcessGroupGloo(store, self.rank, len(self.address.ranks), options)
        except RuntimeError:
            self._check_awaited()
            raise
        made.set_timeout(timedelta(seconds=self.address.limit_s))
        return made

    def _bucket_of_all(self, store: Any, device: torch.device) -> Tensor:
        """The trainer's memory, on a GPU that all are on."""
        if self.rank == SENDER:
            bucket = torch.empty(BUCKET_BYTES, dtype=torch.uint8, device=device)
            store.set("bucket", exported(bucket))
            return bucket
        return imported(store.get("bucket"), device)

    @torch.no_grad()
    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        wire = self._wire
        assert wire
        for bucket in buckets(bytes_of((name, weight.contiguous()) for name, weight in weights), BUCKET_BYTES):
            end = 0
            for part in bucket:
                start, end = end, end + len(part)
                wire.buffer[start:end].copy_(part)
            wire.pass_on(end)

    @torch.no_grad()
    def receive(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
        """Into these tensors; comes back after each bucket."""
        wire = self._wire
        assert wire
        for bucket in buckets(bytes_of(weights), BUCKET_BYTES):
            wire.pass_on(sum(map(len, bucket)))
            end = 0
            for part in bucket:
                start, end = end, end + len(part)
                part.copy_(wire.buffer[start:end])
            wire.taken()
            yield

    def received(self, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """New tensors, each as soon as it is whole."""
        begun: list[tuple[str, Tensor]] = []

        def made() -> Iterator[tuple[str, Tensor]]:
            for name, shape, dtype in self.address.tensors:
                begun.append((name, torch.empty(shape, dtype=dtype, device=device)))
                yield begun[-1]

        for _ in self.receive(made()):
            while len(begun) > 1:  # the last one may go on in the next bucket
                yield begun.pop(0)
        yield from begun


class _Wire(Protocol):
    buffer: Tensor

    def pass_on(self, num_bytes: int) -> None:
        """So many bytes of the trainer's buffer, to the others'."""
        ...

    def taken(self) -> None:
        """Told by who has read its buffer."""
        ...


class _Collective:
    """By NCCL between GPUs, else by gloo through the hosts' memory."""

    def __init__(self, group: Any, buffer: Tensor, wait: Callable[[Any], None]) -> None:
        self._group, self.buffer, self._wait = group, buffer, wait

    def pass_on(self, num_bytes: int) -> None:
        self._wait(self._group.broadcast(self.buffer[:num_bytes], SENDER))
        wait_for_device(self.buffer)  # NCCL's `wait` is the stream's, not ours

    def taken(self) -> None:
        """The next broadcast overwrites it when this one has called too."""


class _OneMemory:
    """Of a GPU that trainer and engine are both on, or the workers of an engine: the buffer is the same, and `gloo` says when it may be read
    and when it has been."""

    def __init__(self, gloo: Any, buffer: Tensor, is_sender: bool, wait: Callable[[Any], None]) -> None:
        self._gloo, self.buffer, self._is_sender, self._wait = gloo, buffer, is_sender, wait

    def pass_on(self, num_bytes: int) -> None:
        wait_for_device(self.buffer)
        self._wait(self._gloo.barrier())
        if self._is_sender:
            self.taken()

    def taken(self) -> None:
        wait_for_device(self.buffer)
        self._wait(self._gloo.barrier())


def _drop(gloo: Any, work: Any) -> None:
    """Holds the group until its threads have nothing left to do. By looking: a thread that the end of the process finds in a wait of torch's
    aborts it."""
    while not work.is_completed():
        time.sleep(LOOK_S)


def _named(device: torch.device) -> str:
    """The same in all processes."""
    return f"cuda {torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else "cpu"


def _way(device: torch.device, there: Sequence[str]) -> str:
    """Between the trainer's device and those of the others: `gloo`, `nccl`, or `memory` of the GPU that all are on, which NCCL refuses."""
    devices = [_named(device), *(said.partition(" ")[2] for said in there)]
    if "cpu" in devices or 1 < len(set(devices)) < len(devices):
        return "gloo"
    return "memory" if len(set(devices)) == 1 else "nccl"


def wait_for_device(buffer: Tensor) -> None:
    if buffer.is_cuda:
        torch.cuda.current_stream(buffer.device).synchronize()


def exported(buffer: Tensor) -> bytes:
    """By which another process of this machine finds the memory of a tensor on a GPU, which has to stay as long."""
    return pickle.dumps(reduce_tensor(buffer)[1])


def imported(handle: bytes, device: torch.device) -> Tensor:
    arguments = list(pickle.loads(handle))
    arguments[_DEVICE_OF_HANDLE] = torch.cuda.current_device() if device.index is None else device.index
    return rebuild_cuda_tensor(*arguments)


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


def bytes_of(weights: Iterable[tuple[str, Tensor]]) -> Iterator[Tensor]:
    """The memory of each tensor, in place. Raises ValueError for one that does not lie in one piece."""
    for name, weight in weights:
        if not weight.is_contiguous():
            raise ValueError(f"{name} does not lie in one piece of memory, and so cannot be received")
        yield weight.detach().view(-1).view(torch.uint8)


def _own_address(host: str, port: int) -> str:
    """Of this machine, on the way to another."""
    with socket.create_connection((host, port)) as connection:
        return connection.getsockname()[0]
