"""What runs in a trainer rank's process: a `LocalTrainer` over shards, which takes requests from a socket.

All ranks are sent the same kinds of requests in the same order, so that their collectives meet. The driver's side is
`sluice.trainers.ranks`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sluice.algorithms import LossOutput
from sluice.connection import Answer, failed, read, write
from sluice.data.batch import MicroBatch, nothing
from sluice.errors import NonFiniteError, SluiceError, TrainingError, boundary
from sluice.interfaces import TrainerOutput
from sluice.processes import Parent, belong_to, own_address
from sluice.tracking.metrics import Metrics
from sluice.trainers.fsdp import Degrees, ParallelState, ShardedModel
from sluice.trainers.local import LocalTrainer, Seen
from sluice.trainers.logprobs import Loss
from sluice.trainers.sharded_optim import ShardedOptimizer
from sluice.trainers.sharded_state import Snapshot, read_into, take_snapshot, write_snapshot
from sluice.weights.broadcast import Sender
from sluice.weights.fingerprint import fingerprint
from sluice.weights.group import Address
from sluice.weights.shared_memory import SharedWeights

TCPStore: Any = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class Look:
    """For a file of the driver's. Answered by whether this machine sees it, and by the machine's name."""

    file: str


@dataclass(frozen=True)
class Meet:
    """To rank 0: where do the others find it? Answered by host and port."""


@dataclass(frozen=True)
class Begin:
    trainer: Callable[[ParallelState], LocalTrainer]
    rank: int
    degrees: Degrees
    on_gpu: bool
    address: tuple[str, int]
    limit_s: float
    """Longest wait for the other ranks."""
    restore: tuple[str, dict[str, Any]] | None
    """Folder of a checkpoint and what its `WriteSnapshot` gave."""
    published: list[tuple[str, Tensor]]
    """Names, shapes and dtypes."""


@dataclass(frozen=True)
class Forward:
    """Answered by [T] tensors; None for what is None."""

    output: TrainerOutput
    micro_batches: list[MicroBatch | None]


@dataclass(frozen=True)
class ForwardBackward:
    """Answered by metrics and what each micro-batch saw. All ranks have equally many, None where there is none left."""

    micro_batches: list[tuple[MicroBatch, str] | None]
    """Each with where it is, for messages."""
    loss: Loss | None


@dataclass(frozen=True)
class OptimStep:
    """Answered by metrics, the same on all ranks."""


@dataclass(frozen=True)
class UpdateReference:
    pass


@dataclass(frozen=True)
class CopyTo:
    """Rank 0 writes the weights into memory that a process of this machine has open. Answered by their fingerprint."""

    pid: int
    fd: int


@dataclass(frozen=True)
class BroadcastTo:
    """Rank 0 sends the weights to an engine that waits."""

    address: Address
    version: int


@dataclass(frozen=True)
class Fingerprint:
    pass


@dataclass(frozen=True)
class Save:
    """A folder that `transformers` loads, or only the adapter in it."""

    folder: str
    adapter: bool


@dataclass(frozen=True)
class TakeSnapshot:
    """Keep a copy of the state until the next one is taken; answered by what is not in its files."""


@dataclass(frozen=True)
class WriteSnapshot:
    """By a thread, while other requests are answered; answered under its number. May be asked for again."""

    number: int
    folder: str


def serve(fd: int, parent: Parent) -> None:
    pipe = belong_to(parent, fd)
    try:
        asyncio.run(_serve(pipe))
    except BaseException:
        traceback.print_exc()
    os._exit(1)


async def _serve(pipe: socket.socket) -> None:
    """What goes wrong unforeseen ends the process, and with it the driver ends all others."""
    host = own_address(pipe)
    reader, writer = await asyncio.open_connection(sock=pipe)
    server = _Server(host, writer)
    while True:
        try:
            message = await read(reader)
        except EOFError:  # the parent closed its end, or died
            os.killpg(0, signal.SIGKILL)
        server.take(message)
        await writer.drain()


class _Server:
    def __init__(self, host: str, writer: asyncio.StreamWriter) -> None:
        self.host, self.writer = host, writer
        self.loop = asyncio.get_running_loop()
        self.store: Any = None
        self.rank: _Rank

    def take(self, message: Any) -> None:
        if isinstance(message, WriteSnapshot):
            threading.Thread(target=self._write, args=(message,), daemon=True).start()
            return
        try:
            answer = Answer(None, self._answer(message))
        except SluiceError as error:
            _explain()
            answer = failed(None, error)
        write(self.writer, answer)

    def _answer(self, message: Any) -> Any:
        match message:
            case Look(file):
                return os.path.exists(file), socket.gethostname()
            case Meet():
                self.store = TCPStore(self.host, 0, is_master=True, wait_for_workers=False)
                return self.host, self.store.port
            case Begin():
                self.rank = _begun(message, self.store)
            case Forward(output, micro_batches):
                return self.rank.forward(output, micro_batches)
            case ForwardBackward(micro_batches, loss):
                return self.rank.forward_backward(micro_batches, loss)
            case OptimStep():
                return _plain(_result_of(self.rank.trainer.optim_step()))
            case UpdateReference():
                _result_of(self.rank.trainer.update_reference())
            case CopyTo(pid, fd):
                return self.rank.copy_to(pid, fd)
            case BroadcastTo(address, version):
                self.rank.broadcast(address, version)
            case Fingerprint():
                return _result_of(self.rank.trainer.fingerprint())
            case Save(folder, adapter):
                self.rank.save(folder, adapter)
            case TakeSnapshot():
                return self.rank.take_snapshot()
            case _:
                raise TypeError(f"a message that nobody sends: {message!r}")
        return None

    def _write(self, message: WriteSnapshot) -> None:
        answer = Answer(message.number)
        try:
            with boundary(TrainingError, f"rank {self.rank.parallel.rank} could not write its part"):
                self.rank.write_snapshot(message.folder)
        except SluiceError as error:
            _explain()
            answer = failed(message.number, error)
        except BaseException as error:  # of a thread nobody sees the end, and the driver waits
            _explain()
            answer = failed(message.number, TrainingError(f"{type(error).__name__}: {error}"))
        self.loop.call_soon_threadsafe(write, self.writer, answer)


def _begun(message: Begin, store: Any) -> _Rank:
    degrees, limit = message.degrees, timedelta(seconds=message.limit_s)
    device = torch.device("cpu")
    if message.on_gpu:
        device = torch.device("cuda", message.rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    store = store or TCPStore(*message.address, is_master=False, timeout=limit)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=store,
        rank=message.rank,
        world_size=degrees.num_ranks,
        timeout=limit,
    )
    parallel = ParallelState.of(message.rank, degrees, device)
    rank = _Rank(message.trainer(parallel), parallel, message.published)
    if message.restore:
        rank.restore(*message.restore)
    return rank


class _Rank:
    def __init__(self, trainer: LocalTrainer, parallel: ParallelState, published: Sequence[tuple[str, Tensor]]) -> None:
        self.trainer, self.parallel, self.published = trainer, parallel, published
        self.refused: list[NonFiniteError] = []
        trainer.refuse = self.refused.append  # the other ranks wait in their collectives, so it goes on
        self.sender = Sender()
        self.snapshot: Snapshot | None = None
        self.shared: dict[tuple[int, int], SharedWeights] = {}

    def forward(self, output: TrainerOutput, micro_batches: Sequence[MicroBatch | None]) -> list[Tensor | None]:
        outputs: list[Tensor | None] = []
        for micro_batch in micro_batches:
            values = self.trainer.outputs(micro_batch or nothing(), output)
            outputs.append(None if micro_batch is None else values.cpu())
            self._reshard()
        return outputs

    def forward_backward(
        self, micro_batches: Sequence[tuple[MicroBatch, str] | None], loss: Loss | None
    ) -> tuple[Metrics, list[Seen | None]]:
        """Raises NonFiniteError when any rank has a loss that is no number, and drops the gradients on all."""
        metrics, saw = Metrics(), list[Seen | None]()
        for part in micro_batches:
            if part is None:
                self.trainer.backward(nothing(), loss and _no_loss, "nothing")
                saw.append(None)
            else:
                added, seen = self.trainer.backward(part[0], loss, part[1])
                metrics += added
                saw.append(seen and Seen(*(column.cpu() for column in seen)))
            self._reshard()
        errors = self._gathered([str(error) for error in self.refused[:1]])
        self.refused.clear()
        if error := next((error for error in errors if error), None):
            self.trainer.drop_gradients()
            raise NonFiniteError(error[0])
        self.trainer.keep_gradients(loss)
        return _plain(metrics), saw

    def _gathered(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.parallel.degrees.num_ranks
        dist.all_gather_object(values, value, group=self.parallel.words)
        return values

    def _reshard(self) -> None:
        critic = self.trainer.critic
        for model in (self.trainer.model, self.trainer.reference, critic and critic.own_model):
            if isinstance(model, ShardedModel):
                model.reshard()

    def copy_to(self, pid: int, fd: int) -> str:
        weights = self.trainer.model.named_weights()
        if self.parallel.rank > 0:
            return fingerprint(weights)
        if (pid, fd) not in self.shared:
            self.shared[pid, fd] = SharedWeights(self.published, os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR))
        shared = self.shared[pid, fd]

        def written() -> Any:
            for pair in weights:
                shared.write([pair])
                yield pair

        return fingerprint(written())

    def broadcast(self, address: Address, version: int) -> None:
        weights = self.trainer.model.named_weights()
        try:
            if self.parallel.rank == 0:
                self.sender.send(address, version, weights, self.parallel.device)
        finally:
            for _ in weights:  # all ranks take part, whatever went wrong at the engine
                pass

    def save(self, folder: str, adapter: bool) -> None:
        model: Any = self.trainer.model
        (model.export_adapter if adapter else model.export)()(folder)
        if self.parallel.device.type == "cuda":
            torch.cuda.empty_cache()  # an engine that reads the folder may share the GPU

    def take_snapshot(self) -> dict[str, Any]:
        trainer = self.trainer
        self.snapshot = None  # there is room for one
        self.snapshot = take_snapshot(trainer, self.parallel, trainer.reference_moved)
        return {
            "update": trainer.optimizer.update,
            "critic_update": trainer.critic.optimizer.update if trainer.critic else None,
            "reference_moved": trainer.reference_moved,
            "reference_fingerprint": trainer.reference_fingerprint(),
        }

    def write_snapshot(self, folder: str) -> None:
        assert self.snapshot is not None
        write_snapshot(self.snapshot, folder, self.parallel)

    def restore(self, folder: str, state: dict[str, Any]) -> None:
        trainer = self.trainer
        assert isinstance(trainer.model, ShardedModel)
        trainer.model.check_base(folder)
        if not state["reference_moved"]:
            trainer.check_reference(state["reference_fingerprint"])
        read_into(trainer, folder, self.parallel, state["reference_moved"])
        trainer.reference_moved = state["reference_moved"]
        assert isinstance(trainer.optimizer, ShardedOptimizer)
        trainer.optimizer.set_update(state["update"])
        if trainer.critic:
            assert isinstance(trainer.critic.optimizer, ShardedOptimizer)
            trainer.critic.optimizer.set_update(state["critic_update"])


def _explain() -> None:
    """In the log, which may be on the disk that is full."""
    with suppress(OSError):
        traceback.print_exc()


def _no_loss(logprobs: Tensor, entropies: Tensor, batch: MicroBatch) -> LossOutput:
    """Of a micro-batch without samples: its gradient is 0 everywhere."""
    return LossOutput(logprobs.sum(), logprobs, logprobs, logprobs.bool(), Metrics())


def _plain(metrics: Metrics) -> Metrics:
    """Numbers instead of tensors, which may be on a GPU."""
    return Metrics(
        {
            name: replace(metric, **{k: float(v) if isinstance(v, Tensor) else v for k, v in vars(metric).items()})
            for name, metric in metrics.items()
        }
    )


def _result_of(work: Any) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError(f"{work!r} waits for something")
