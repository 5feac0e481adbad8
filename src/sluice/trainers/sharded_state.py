"""What a rank's trainer holds, in files of which each rank writes its own part, and which any number of ranks can read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from sluice.trainers.fsdp import Place, ShardedModel, local
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
            found[f"reference.{name}"] = reference.place.like(param, local(param))
    return found


def take_snapshot(trainer: LocalTrainer, place: Place, reference_moved: bool) -> Snapshot:
    """All ranks take part."""
    shards = {name: _copied(tensor, place) for name, tensor in tensors_of(trainer, reference_moved).items()}
    return Snapshot(shards, trainer.model.export())


def write_snapshot(snapshot: Snapshot, folder: str, place: Place) -> None:
    """From a thread of every rank. Raises NonFiniteError for weights that are no numbers."""
    with _quiet():
        save(
            snapshot.shards,
            storage_writer=FileSystemWriter(Path(folder) / FOLDER, sync_files=False),
            process_group=place.files,
        )
    snapshot.write_weights(folder)


def read_into(trainer: LocalTrainer, folder: str, place: Place, reference_moved: bool) -> None:
    """What another number of ranks may have written."""
    with _quiet():
        load(
            tensors_of(trainer, reference_moved),
            storage_reader=FileSystemReader(Path(folder) / FOLDER),
            process_group=place.files,
        )


def _optimizer(optimizer: Any) -> ShardedOptimizer:
    assert isinstance(optimizer, ShardedOptimizer)
    return optimizer


def _copied(tensor: Tensor, place: Place) -> Tensor:
    copy = local(tensor).to("cpu", copy=True)
    return place.like(tensor, copy) if isinstance(tensor, DTensor) else copy


@contextmanager
def _quiet() -> Iterator[None]:
    """Files are the same with or without what torch would like to be told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
