"""What makes it safe to go on in a run folder: one process at a time, and nothing of steps that are made again."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from sluice.errors import RunFolderError
from sluice.tracking import ledger
from sluice.tracking.rundir import RunDir, read_lines, write_atomically


@contextmanager
def locked(rundir: RunDir) -> Generator[None]:
    """Hold the run folder. The lock dies with this process, however that ends. Raises RunFolderError when it is held."""
    import fcntl  # not on Windows, where nothing holds two runs apart

    with open(rundir.path / ".lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, a forked child does not keep it
        except OSError:
            file.seek(0)
            raise RunFolderError(
                f"the run folder {rundir.path} is in use by {file.read().strip() or 'another process'}; wait until it has "
                "ended, or stop it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def set_aside(rundir: RunDir, step: int) -> Path | None:
    """Move metrics, ledger and checkpoints of steps after `step` to `set-aside-001` (002, …); None when there are none.

    Killed in between, it is done when it is called again. Half-written files of a killed process are removed.
    """
    for partial in [*rundir.path.glob(".*.partial"), *rundir.path.glob("*/.*.partial")]:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    lines = read_lines(rundir.metrics) if rundir.metrics.exists() else []
    later = [line for line in lines if line["step"] > step]
    files = [rundir.ledger / f"step-{n:06d}.parquet" for n in ledger.steps(rundir) if n > step]
    files += [path for path in rundir.checkpoints.glob("step-*") if int(path.name.removeprefix("step-")) > step]
    if not later and not files:
        return None
    folder = _next_free(rundir.path)
    if later:
        write_atomically(folder / rundir.metrics.name, _lines(later))
    for path in files:
        target = folder / path.relative_to(rundir.path)
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    if later:
        write_atomically(rundir.metrics, _lines([line for line in lines if line["step"] <= step]))
    return folder


def _next_free(path: Path) -> Path:
    number = 1 + max((int(old.name.removeprefix("set-aside-")) for old in path.glob("set-aside-*")), default=0)
    folder = path / f"set-aside-{number:03d}"
    folder.mkdir()
    return folder


def _lines(records: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()
