"""The trainer of several ranks, each a process with its shard of the model: what the loop talks to.

It divides micro-batches over the ranks, and puts together what they say. What runs in a rank is `sluice.trainers.rank`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from sluice.connection import Answer, Connection
from sluice.data.batch import MicroBatch, Minibatch, Packing, collate, deal, under_budget
from sluice.errors import ConfigError, SluiceError, TrainingError, boundary
from sluice.interfaces import Layout, SharedMemory, TrainerOutput
from sluice.processes import Child, Died, Launch, Process
from sluice.tracking.metrics import Metrics
from sluice.trainers.fsdp import Degrees, ParallelState
from sluice.trainers.local import LocalTrainer, about
from sluice.trainers.logprobs import Loss
from sluice.trainers.rank import (
    Begin,
    BroadcastTo,
    CopyTo,
    Fingerprint,
    Forward,
    ForwardBackward,
    Look,
    Meet,
    OptimStep,
    Save,
    TakeSnapshot,
    UpdateReference,
    WriteSnapshot,
)
from sluice.trainers.sharded_state import check_whole
from sluice.types import Sample
from sluice.weights.group import Address
from sluice.weights.publication import WeightsMoved

GRACE_S = 0.5
"""In which the ranks that noticed the death of another die too: the first of them that a signal ended is named."""


class RankedTrainer:
    """Ranks are started by the first that asks anything, and are gone with this process, or at `close`."""

    def __init__(
        self,
        trainer: Callable[[ParallelState], LocalTrainer],
        degrees: Degrees,
        packing: Packing,
        weights: Sequence[tuple[str, Tensor]],
        tokenizer: Any,
        *,
        on_gpu: bool,
        answer_limit_s: float,
        launch: Callable[[int], Launch] | None = None,
    ) -> None:
        """`trainer` makes a rank's trainer in its process, where it must be importable. `weights` say what is published: names, shapes
        and dtypes. With `on_gpu` each rank takes one. A rank that gives no answer for `answer_limit_s` is killed, as it starts too. `launch`
        gives what starts a rank elsewhere; None: on this machine, where it sees the memory of this process.
        """
        self.degrees, self.packing = degrees, packing
        self._run_folder: Path | None = None
        self._trainer, self._published, self._tokenizer = trainer, _on_no_device(weights), tokenizer
        self.on_gpu, self._answer_limit_s = on_gpu, answer_limit_s
        self._launch = launch
        self._connections: list[Connection] = []
        self._connecting = asyncio.Lock()
        self._deaths: list[tuple[int, str, bool]] = []
        self._burial: asyncio.Task[None] | None = None
        self._failure: SluiceError | None = None
        self._restore: tuple[str, dict[str, Any]] | None = None
        self._numbers = count()
        self._writing: dict[int, asyncio.Future[None]] = {}
        self.num_updates = 0
        """Since it was made."""
        self._fingerprint: str | None = None
        """Of the weights as they are, if it is known."""
        self._closed = False

    def belongs_to(self, run: Path) -> None:
        """The run's folder, where checkpoints are and each rank's `trainer-RANK.log`; it is told before there are ranks."""
        self._run_folder = run

    # -- what the loop asks --

    async def forward(self, samples: Sequence[Sample], output: TrainerOutput, layout: Layout | None = None) -> None:
        """As the local trainer does."""
        packing = replace(self.packing, layout=layout or self.packing.layout)
        micro_batches = [collate(part, packing.layout) for part in under_budget(samples, packing)]
        hands = deal(micro_batches, [*map(_size, micro_batches)], self.degrees.data)
        answers = await self._ask_each([Forward(output, [part and _sent(part) for part in hand]) for hand in hands])
        for hand, values in zip(hands, answers, strict=True):
            for micro_batch, own in zip(hand, values, strict=True):
                if micro_batch:
                    micro_batch.fill(output, own)

    async def forward_backward(self, minibatch: Minibatch, loss: Loss | None) -> Metrics:
        """As the local trainer does: raises NonFiniteError, and no rank keeps a gradient of the update. `loss` goes to other processes."""
        parts = minibatch.micro_batches
        hands = deal(parts, [*map(_size, parts)], self.degrees.data)
        answers = await self._ask_each(
            [ForwardBackward([part and (_sent(part), about(minibatch, part)) for part in hand], loss) for hand in hands]
        )
        metrics = Metrics()
        for hand, (added, saw) in zip(hands, answers, strict=True):
            metrics += added
            for micro_batch, seen in zip(hand, saw, strict=True):
                if micro_batch and seen:
                    micro_batch.record(minibatch.index, *seen)
        return metrics.per_update()

    async def optim_step(self) -> Metrics:
        self._fingerprint = None
        self.num_updates += 1
        return (await self._ask_all(OptimStep()))[0]

    async def update_reference(self) -> None:
        await self._ask_all(UpdateReference())

    def weights(self) -> RankedWeights:
        return RankedWeights(self, self.num_updates)

    async def fingerprint(self) -> str:
        known = self._fingerprint or (await self._ask_all(Fingerprint()))[0]
        self._fingerprint = known
        return known

    async def copy_weights(self, shared: SharedMemory) -> None:
        self._fingerprint = (await self._ask_all(CopyTo(os.getpid(), shared.fd)))[0]

    async def broadcast_weights(self, address: Address, version: int, num_updates: int) -> None:
        """Those after so many updates; the ranks make later ones only when they are sent."""
        if num_updates != self.num_updates:
            raise WeightsMoved(version)
        await self._ask_all(BroadcastTo(address, version))

    async def save_weights(self, folder: str, adapter: bool) -> None:
        await self._ask_all(Save(folder, adapter))

    def snapshot(self) -> Callable[[str], dict[str, Any]]:
        """As the local trainer does; each rank keeps the copy of its own shard, and writes it."""
        loop = asyncio.get_running_loop()
        # tasks in the order in which they are made: the ranks are asked before they are asked for anything later
        taken = [loop.create_task(self._answer(c, TakeSnapshot())) for c in self._connections]

        def write(folder: str) -> dict[str, Any]:
            return asyncio.run_coroutine_threadsafe(self._write(os.path.abspath(folder), taken), loop).result()

        return write

    async def _write(self, folder: str, taken: Sequence[asyncio.Task[dict[str, Any]]]) -> dict[str, Any]:
        state = (await self._first_failure(taken))[0]
        number = next(self._numbers)
        loop = asyncio.get_running_loop()
        pending = [loop.create_future() for _ in self._connections]
        for rank, (connection, future) in enumerate(zip(self._connections, pending, strict=True)):
            self._writing[number * self.degrees.num_ranks + rank] = future
            connection.send(WriteSnapshot(number * self.degrees.num_ranks + rank, folder))
        try:
            async with asyncio.timeout(self._answer_limit_s):
                await self._first_failure(pending)
        except TimeoutError:
            raise TrainingError(
                f"the ranks did not write {folder} within {self._answer_limit_s:g} s (trainer.answer_limit_s)"
            ) from None
        await asyncio.to_thread(check_whole, folder)
        self._tokenizer.save_pretrained(folder)
        return state

    def restore(self, folder: str, state: dict[str, Any]) -> None:
        """The ranks read it as they begin."""
        self._restore = (os.path.abspath(folder), state)

    def status(self) -> str:
        """What it does at the moment, for people."""
        running = [f"{rank}: {c.process}" for rank, c in enumerate(self._connections)]
        return f"{self.degrees.num_ranks} ranks ({', '.join(running) or 'not started yet'})"

    async def close(self) -> None:
        self._closed = True
        if self._burial:
            self._burial.cancel()
        for connection in self._connections:
            connection.end("the trainer was closed")

    # -- the ranks --

    async def _ask_each(self, messages: Sequence[Any]) -> list[Any]:
        """One message for each set of ranks with the same micro-batches; what the first of each set answers."""
        ranks = range(self.degrees.num_ranks)
        answers = await self._ask([messages[self.degrees.data_rank(rank)] for rank in ranks])
        return [answer for rank, answer in zip(ranks, answers, strict=True) if self.degrees.speaks(rank)]

    async def _ask_all(self, message: Any) -> list[Any]:
        return await self._ask([message] * self.degrees.num_ranks)

    async def _ask(self, messages: Sequence[Any]) -> list[Any]:
        """Raises what a rank says is wrong, and TrainingError when one died."""
        await self._started()
        return await self._first_failure(
            [self._answer(connection, message) for connection, message in zip(self._connections, messages, strict=True)]
        )

    def _answer(self, connection: Connection, message: Any) -> Coroutine[Any, Any, Any]:
        return connection.ask(message, self._answer_limit_s, "trainer.answer_limit_s")

    async def _first_failure(self, waiting: Sequence[Any]) -> list[Any]:
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        if any(isinstance(answer, Died) for answer in answers):
            raise await self._failed()
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    async def _failed(self) -> SluiceError:
        if self._burial:
            await asyncio.wait([self._burial])
        return self._failure or TrainingError("the trainer was closed")

    async def _started(self) -> None:
        async with self._connecting:
            if self._failure or self._closed:
                raise await self._failed()
            if self._connections:
                return
            processes = [self._launched(rank) for rank in range(self.degrees.num_ranks)]
            try:
                for rank, process in enumerate(processes):
                    await self._connect(rank, process)
                await self._check_run_folder()
                await self._begin()
            except BaseException as error:
                if isinstance(error, SluiceError):  # told to whoever else waits for them
                    self._failure = error
                await self.close()
                for process in processes:
                    process.kill()
                raise

    async def _connect(self, rank: int, process: Child) -> None:
        try:
            with boundary(TrainingError, f"trainer rank {rank} could not be started"):
                pipe = await asyncio.to_thread(process.connect)
                reader, writer = await asyncio.open_connection(sock=pipe)
        except Died as error:
            raise TrainingError(f"trainer rank {rank} could not be started: {error}") from None
        ended = partial(self._ended, rank)
        self._connections.append(Connection(process, reader, writer, self._take, ended))

    def _launched(self, rank: int) -> Child:
        log = self._run_folder / f"trainer-{rank}.log" if self._run_folder else None
        launch: Launch = self._launch(rank) if self._launch else Process
        with boundary(TrainingError, f"trainer rank {rank} could not be started"):
            return launch("sluice.trainers.rank", path=list(sys.path), folder=os.getcwd(), log=log, variables={})

    async def _check_run_folder(self) -> None:
        """Every rank writes its part of a checkpoint there."""
        if self._run_folder is None:
            return
        # of a new name, since another machine may have a folder of this one
        file = self._run_folder.absolute() / f".look-{secrets.token_hex(8)}"
        with boundary(TrainingError, f"{self._run_folder} cannot be written to"):
            file.touch()
        try:
            answers = await self._first_failure([self._answer(c, Look(str(file))) for c in self._connections])
        finally:
            file.unlink(missing_ok=True)
        for rank, (sees, machine) in enumerate(answers):
            if not sees:
                raise ConfigError(
                    f"{machine}, the machine of trainer rank {rank} ({self._connections[rank].process}), does not see the run folder "
                    f"{self._run_folder.absolute()}, into which each rank writes its part of a checkpoint; set run.folder to a folder "
                    "that all machines share"
                )

    async def _begin(self) -> None:
        first = self._answer(self._connections[0], Meet())
        (address,) = await self._first_failure([first])
        rest = (self.degrees, self.on_gpu, address, self._answer_limit_s, self._restore, self._published)
        begins = [Begin(self._trainer, rank, *rest) for rank in range(self.degrees.num_ranks)]
        await self._first_failure([self._answer(c, begin) for c, begin in zip(self._connections, begins, strict=True)])

    def _take(self, number: int, answer: Answer) -> None:
        future = self._writing.pop(number)
        if not future.done():
            future.set_exception(answer.error) if answer.error else future.set_result(None)

    def _ended(self, rank: int, connection: Connection, cause: str) -> None:
        """One that dies takes all with it: they could only wait for it."""
        if self._closed or self._failure:
            return
        _, by_signal = connection.process.cause_of_death()
        self._deaths.append((rank, cause, by_signal))
        if self._burial is None:
            self._burial = asyncio.create_task(self._bury())

    async def _bury(self) -> None:
        await asyncio.sleep(GRACE_S)
        rank, cause, _ = next((death for death in self._deaths if death[2]), self._deaths[0])
        see = f"; see {self._run_folder}/trainer-{rank}.log" if self._run_folder else ""
        self._failure = TrainingError(
            f"trainer rank {rank} of {self.degrees.num_ranks}: {cause}; the other ranks were ended with it{see}"
        )
        for connection in self._connections:
            connection.end("another rank died")
        for future in self._writing.values():
            if not future.done():
                future.set_exception(Died("a rank died"))


@dataclass(frozen=True)
class RankedWeights:
    """A handle to weights of which each rank has a shard."""

    trainer: RankedTrainer
    num_updates: int
    """That there were when it was made."""

    @property
    def model(self) -> None:
        """No process has all of it."""

    async def copy_to(self, shared: SharedMemory) -> None:
        """Put together tensor by tensor at rank 0, which writes them there."""
        await self.trainer.copy_weights(shared)

    async def broadcast(self, address: Address, version: int) -> None:
        """From rank 0."""
        await self.trainer.broadcast_weights(address, version, self.num_updates)

    async def fingerprint(self, version: int) -> str:
        if self.num_updates != self.trainer.num_updates:
            raise WeightsMoved(version)
        return await self.trainer.fingerprint()

    async def save(self, folder: str, *, adapter: bool = False) -> None:
        """By rank 0."""
        await self.trainer.save_weights(folder, adapter)


def _size(micro_batch: MicroBatch) -> int:
    return micro_batch.input_ids.numel()


def _on_no_device(weights: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return [(name, tensor.detach().to("meta")) for name, tensor in weights]


def _sent(micro_batch: MicroBatch) -> MicroBatch:
    """Without the samples, of which a rank needs nothing but the tensors."""
    return replace(micro_batch, samples=[])
