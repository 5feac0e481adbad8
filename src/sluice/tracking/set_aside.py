"""Nothing of steps that are made again is mixed with what is made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sluice.errors import DataError
from sluice.tracking import ledger
from sluice.tracking.rundir import RunDir, read_lines, write_atomically


def set_aside(rundir: RunDir, step: int) -> Path | None:
    """Move metrics, ledger and checkpoints of steps after `step` to `set-aside-001` (002, …); None when there are none.

    Killed in between, it is done when it is called again. Half-written files of a killed process are removed.
    """
    for partial in [*rundir.path.glob(".*.partial"), *rundir.path.glob("*/.*.partial")]:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    lines = read_lines(rundir.metrics) if rundir.metrics.exists() else []
    if strange := [n for n, line in enumerate(lines, start=1) if type(line.get("step")) is not int]:
        raise DataError(
            f"{rundir.metrics}:{strange[0]}: not a line of sluice's: its step is no whole number; remove the line"
        )
    later = [line for line in lines if line["step"] > step]
    files = [rundir.ledger / f"step-{n:06d}.parquet" for n in ledger.steps(rundir) if n > step]
    files += [path for path in rundir.checkpoint_folders() if path.name > rundir.checkpoint(step).name]
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
    taken = [old.name.removeprefix("set-aside-") for old in path.glob("set-aside-*")]
    number = 1 + max((int(name) for name in taken if name.isdecimal()), default=0)
    folder = path / f"set-aside-{number:03d}"
    folder.mkdir()
    return folder


def _lines(records: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()
