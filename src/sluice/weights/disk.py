"""Publication through a folder that trainer and engines see: for engines on other hosts that share a disk, and for engines of other makes."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sluice.errors import EngineError, boundary
from sluice.interfaces import LanguageModel, Weights
from sluice.weights.fingerprint import fingerprint
from sluice.weights.publication import ReadWriteLock, Stream, WeightsMoved

ADAPTER_FOLDER = "adapter"
"""Where it is in a model folder, as peft loads it."""


class Disk:
    """A model folder for each version, beside its name until it is whole, and removed when the next one is there."""

    fds = ()

    def __init__(self, parent: Path | None, *, adapter: bool = False) -> None:
        """`parent` gets a folder for the run; None: the run's own folder has one. `adapter`: without the weights under it, which engines
        have."""
        self._parent, self._adapter = parent, adapter
        self.folder = Path()
        """Of the run that it belongs to, once it does."""
        self._lock = ReadWriteLock()
        self.version: int | None = None

    def belongs_to(self, run: Path) -> None:
        """Only versions of weights are in its folder."""
        where = sha256(str(run.absolute()).encode()).hexdigest()[:8]  # others may have a run of this name elsewhere
        self.folder = (self._parent / f"{run.name}-{where}-weights" if self._parent else run / "weights").absolute()

    async def publish(self, weights: Weights, version: int) -> int:
        async with self._lock.written():
            if version == self.version:
                return 0
            final = self.of(version)
            unfinished = final.with_name(f".{final.name}.partial")
            what = f"the weights of version {version} cannot be published in {self.folder} (engine.publication_folder)"
            with boundary(EngineError, what):
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
                try:
                    await weights.save(str(unfinished), adapter=self._adapter)
                    await asyncio.to_thread(self._put_in_place, unfinished, final)
                except BaseException:
                    shutil.rmtree(unfinished, ignore_errors=True)
                    raise
            self.version = version
            return sum(path.stat().st_size for path in final.rglob("*") if path.is_file())

    def _put_in_place(self, unfinished: Path, final: Path) -> None:
        if not any(unfinished.iterdir()):
            raise EngineError(
                f"{final.name} was written on another machine, that of the trainer's rank 0: {unfinished} is empty here; set "
                "engine.publication_folder to a place that all machines share"
            )
        shutil.rmtree(final, ignore_errors=True)  # of a run that was killed
        unfinished.rename(final)
        self._remove_all_but(final)

    def _remove_all_but(self, kept: Path | None) -> None:
        for version in self.folder.glob("*version-*"):
            if version != kept:
                shutil.rmtree(version, ignore_errors=True)

    def of(self, version: int) -> Path:
        """The folder of a version."""
        return self.folder / f"version-{version:06d}"

    def link(self, engine: str, receivers: int = 1) -> DiskLink:
        return DiskLink(DiskInlet(str(self.folder)), self._lock)

    async def fingerprint(self, version: int) -> str:
        """Of the weights of a version. Raises WeightsMoved when there are later ones."""
        async with self._lock.read():
            if version != self.version:
                raise WeightsMoved(version)
            return await asyncio.to_thread(fingerprint, tensors_of(self.of(version)))

    def close(self) -> None:
        if self.version is not None:
            self._remove_all_but(None)
        with suppress(OSError):  # it is gone already, or has what is not ours
            self.folder.rmdir()


@dataclass(frozen=True)
class DiskLink:
    inlet: DiskInlet
    lock: ReadWriteLock

    async def deliver(self, version: int, take_over: Callable[[], Awaitable[object]]) -> None:
        async with self.lock.read():
            await take_over()


@dataclass(frozen=True)
class DiskInlet:
    folder: str

    def read(self, model: LanguageModel, version: int) -> None:
        folder = self.of(version)
        with boundary(EngineError, f"the weights in {folder}"):
            model.load_weights(str(folder))

    def tensors(self, version: int, device: torch.device, receiver: int) -> Iterator[tuple[str, Tensor]]:
        """In the host's memory."""
        return tensors_of(self.of(version))

    def shapes(self, version: int) -> Iterator[tuple[str, Iterable[int]]]:
        for file in self.of(version).glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    yield name, opened.get_slice(name).get_shape()

    def make_way(self, inlet: Stream) -> None:
        """Nothing here tells whether its run goes on."""

    def of(self, version: int) -> Path:
        """The folder of a version. Raises EngineError when it is not seen here."""
        folder = Path(self.folder) / f"version-{version:06d}"
        if not folder.is_dir():
            raise EngineError(
                f"the engine does not see {folder}; set engine.publication_folder to a place that the hosts of trainer and engine "
                "share, or engine.publication=broadcast"
            )
        return folder


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """What its files hold, one after the other."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                yield name, opened.get_tensor(name)
