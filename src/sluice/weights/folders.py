"""Publication by folders: weights are written where another program can load them, and appear there whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open

from sluice.weights.fingerprint import combined, parts

_MEMORY = Path("/dev/shm")
_PREFIX = "sluice-weights-"


class PublishedFolders:
    """Model folders of this run, one per published version; the newest one stays for a server that must be started again."""

    def __init__(self, parent: str | None = None) -> None:
        """In `parent`, which the server sees too; left out, in this machine's memory, or where there is none for files in a
        temporary folder."""
        here = _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        self._parent = Path(parent).absolute() if parent else here
        self._is_local = parent is None
        self._own: Path | None = None
        self.newest: Path | None = None

    async def add(self, save: Callable[[str], Awaitable[None]], version: int) -> None:
        """`save` writes a model into the folder that it is given."""
        if self._own is None:
            self._parent.mkdir(parents=True, exist_ok=True)
            if self._is_local:
                _remove_orphans(self._parent)
            self._own = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=self._parent))
        whole, half = self._own / f"version-{version:06d}", self._own / "half-written"
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir()
        await save(str(half))
        shutil.rmtree(whole, ignore_errors=True)  # of a version that was published before a step was made again
        half.rename(whole)
        self.newest = whole

    def keep_newest(self) -> None:
        for folder in self._own.iterdir() if self._own else ():
            if folder != self.newest:
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        if self._own:
            shutil.rmtree(self._own, ignore_errors=True)


def _remove_orphans(parent: Path) -> None:
    """What runs on this machine have left that were killed: in memory it would stay until the next start of the machine."""
    for folder in parent.glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        with suppress(OSError):
            if pid.isdigit() and not Path("/proc", pid).exists() and folder.stat().st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)


def fingerprint_of_folder(folder: str | Path) -> str:
    """Of the weights in its files."""
    found = []
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found += parts((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118 - it is no mapping
    return combined(found)
