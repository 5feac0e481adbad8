"""What a rank's trainer holds, in files of which each rank writes its own part, and which any number of ranks can read."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from sluice.errors import TrainingError
from sluice.tracking.rundir import is_disk_full
from sluice.trainers.fsdp import ParallelState, ShardedModel, local
from sluice.trainers.local import LocalTrainer
from sluice.trainers.sharded_optim import ShardedOptimizer

FOLDER = "shards"
"""Within a checkpoint."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of a rank's state in RAM."""

    shards: dict[str, Tensor]
    write_weights: Callable[[str], None]
    """As they are published, by rank 0, into a folder that `transformers` loads."""


def tensors_of(trainer: LocalTrainer, reference_moved: bool) -> dict[str, Tensor]:
    """Over the memory that is trained."""
    found = {f"policy.{name}": tensor for name, tensor in _optimizer(trainer.optimizer).tensors()}
    if trainer.critic:
        found |= {f"critic.{name}": tensor for name, tensor in _optimizer(trainer.critic.optimizer).tensors()}
    if reference_moved:
        reference = trainer.reference
        assert isinstance(reference, ShardedModel)
        for name, param in reference.model.named_parameters():
            found[f"reference.{name}"] = reference.parallel.like(param, local(param))
    return found


def take_snapshot(trainer: LocalTrainer, parallel: ParallelState, reference_moved: bool) -> Snapshot:
    """All ranks take part."""
    shards = {name: _copied(tensor, parallel) for name, tensor in tensors_of(trainer, reference_moved).items()}
    return Snapshot(shards, trainer.model.export())


def write_snapshot(snapshot: Snapshot, folder: str, parallel: ParallelState) -> None:
    """From a thread of every rank; may be called again when a rank had no room. Raises NonFiniteError for weights that are no numbers."""
    try:
        with _quiet():
            save(
                snapshot.shards,
                storage_writer=_Writer(Path(folder) / FOLDER, sync_files=False),
                process_group=parallel.files,
            )
    except CheckpointException as error:  # it is no Exception, and lists what each rank raised
        raise next(iter(error.failures.values()))[0] from None
    snapshot.write_weights(folder)


class _Writer(FileSystemWriter):
    """What it raises is pickled for all ranks, and so loses its cause."""

    def write_data(self, *args: Any) -> Any:
        try:
            return super().write_data(*args)
        except Exception as error:
            if is_disk_full(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path)) from None
            raise


def check_whole(folder: str) -> None:
    """By the driver. Raises TrainingError when it lacks something that a rank has written."""
    shards = Path(folder) / FOLDER
    needed = {shards / ".metadata": 0}
    if (shards / ".metadata").exists():
        for part in FileSystemReader(shards).read_metadata().storage_data.values():
            file = shards / part.relative_path
            needed[file] = max(needed.get(file, 0), part.offset + part.length)
    lacking = [file for file, size in needed.items() if not file.is_file() or file.stat().st_size < size]
    if not any(Path(folder).glob("*.safetensors")):
        lacking.append(Path(folder) / "model.safetensors")
    if lacking:
        raise TrainingError(
            f"{lacking[0]} was written by a rank, and this machine does not see all of it; set run.folder to a folder that all "
            "machines share"
        )


def read_into(trainer: LocalTrainer, folder: str, parallel: ParallelState, reference_moved: bool) -> None:
    """What another number of ranks may have written."""
    with _quiet():
        load(
            tensors_of(trainer, reference_moved),
            storage_reader=FileSystemReader(Path(folder) / FOLDER),
            process_group=parallel.files,
        )


def _optimizer(optimizer: Any) -> ShardedOptimizer:
    assert isinstance(optimizer, ShardedOptimizer)
    return optimizer


def _copied(tensor: Tensor, parallel: ParallelState) -> Tensor:
    copy = local(tensor).to("cpu", copy=True)
    return parallel.like(tensor, copy) if isinstance(tensor, DTensor) else copy


@contextmanager
def _quiet() -> Iterator[None]:
    """Files are the same with or without what torch would like to be told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
