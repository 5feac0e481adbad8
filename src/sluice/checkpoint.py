"""Checkpoints that `transformers` loads, and that are never half-written."""

from __future__ import annotations

import shutil
from pathlib import Path

from sluice.errors import TrainingError, boundary
from sluice.interfaces import Trainer
from sluice.tracking.rundir import RunDir


def save_checkpoint(trainer: Trainer, rundir: RunDir, step: int) -> Path:
    """Write `checkpoints/step-000100` beside its final name, then rename it."""
    final = rundir.checkpoints / f"step-{step:06d}"
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with boundary(TrainingError, f"checkpoint {final} could not be written"):
            trainer.save(str(partial))
            partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk has better uses
        raise
    return final
