"""Publication through a folder that trainer and engines see: for engines on other hosts that share a disk, and for engines of other makes."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from sluice.errors import EngineError, boundary
from sluice.interfaces import LanguageModel, Weights
from sluice.weights.publication import Place


class Disk:
    """A model folder for each version, beside its name until it is whole, and removed when the next one is there."""

    fds = ()

    def __init__(self, parent: Path | None) -> None:
        """`parent` gets a folder with the name of the run; None: the run's own folder has one."""
        self._parent = parent
        self.folder = Path()
        self._place = Place()
        self.version: int | None = None

    def belongs_to(self, run: Path) -> None:
        """Only versions of weights are in its folder."""
        self.folder = (self._parent / f"{run.name}-weights" if self._parent else run / "weights").absolute()

    async def publish(self, weights: Weights, version: int) -> int:
        async with self._place.written():
            if version == self.version:
                return 0
            final = self._of(version)
            unfinished = final.with_name(f".{final.name}.partial")
            with boundary(EngineError, f"the weights of version {version} cannot be published in {self.folder}"):
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
                await weights.save(str(unfinished))
                await asyncio.to_thread(self._put_in_place, unfinished, final)
            self.version = version
            return sum(path.stat().st_size for path in final.rglob("*") if path.is_file())

    def _put_in_place(self, unfinished: Path, final: Path) -> None:
        shutil.rmtree(final, ignore_errors=True)  # of a run that was killed
        unfinished.rename(final)
        for other in self.folder.glob("*version-*"):
            if other != final:
                shutil.rmtree(other, ignore_errors=True)

    def _of(self, version: int) -> Path:
        return self.folder / f"version-{version:06d}"

    def link(self, engine: str) -> _DiskLink:
        return _DiskLink(DiskInlet(str(self.folder)), self._place)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class _DiskLink:
    inlet: DiskInlet
    place: Place

    async def deliver(self, version: int, take_over: Callable[[], Awaitable[object]]) -> None:
        async with self.place.read():
            await take_over()


@dataclass(frozen=True)
class DiskInlet:
    folder: str

    def read(self, model: LanguageModel, version: int) -> None:
        folder = Path(self.folder) / f"version-{version:06d}"
        if not folder.is_dir():
            raise EngineError(
                f"the engine does not see {folder}; set engine.publication_folder to a place that the hosts of trainer and engine "
                "share, or engine.publication=broadcast"
            )
        with boundary(EngineError, f"the weights in {folder}"):
            model.load_weights(str(folder))
