"""Which run folder is gone on in, and with which config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sluice.config import TrainConfig
from sluice.configfile import Resolved, load
from sluice.configsafety import RESUMABLE
from sluice.configtree import dotted, inline, leaves
from sluice.errors import ConfigError
from sluice.tracking.rundir import RunDir


def config_of(rundir: RunDir) -> TrainConfig:
    """What a run folder was run with. Raises ConfigError for one that is none of `sluice train`."""
    if not rundir.config.is_file():
        raise ConfigError(
            f"{rundir.path} is no run folder: {rundir.config.name} is missing in it; name one that `sluice train` has made (one "
            "whose process was killed before its run began has nothing to go on from: remove it)"
        )
    return load(TrainConfig, [str(rundir.config)]).config


def resolve_resume(folder: str, settings: Sequence[str]) -> tuple[Resolved[TrainConfig], RunDir]:
    """The config of a run folder with `settings` over it.

    Raises ConfigError for a folder that is no run, and for settings that would change what the run is.
    """
    rundir = RunDir(Path(folder))
    old = config_of(rundir)
    new = load(TrainConfig, [str(rundir.config)], settings)
    _refuse_other(rundir, old, new.config)
    return new, rundir


def resumable(config: TrainConfig) -> RunDir | None:
    """The folder in which checkpoint.auto_resume goes on; None when there is none.

    Raises ConfigError when it is the folder of a run with another config.
    """
    if not config.checkpoint.auto_resume:
        return None
    assert config.run.name is not None  # the config sees to it
    rundir = RunDir(Path(config.run.folder) / config.run.name)
    if not rundir.config.is_file():
        return None
    _refuse_other(rundir, config_of(rundir), config)
    return rundir


def _refuse_other(rundir: RunDir, old: TrainConfig, new: TrainConfig) -> None:
    if different := [what for what in differences(old, new) if not what.startswith(RESUMABLE)]:
        raise ConfigError(
            f"{rundir.path} was run with another config: {'; '.join(different[:4])}"
            + (f"; and {len(different) - 4} more" if len(different) > 4 else "")
            + f". Only {', '.join(key.removesuffix('.') for key in RESUMABLE)} may change when a run goes on; to begin a new run "
            f"from its weights, set model.path to one of {rundir.checkpoints}"
        )
    falls = [key for key in ("trainer", "critic") if getattr(getattr(old, key), "schedule", "constant") != "constant"]
    if falls and old.run.num_steps != new.run.num_steps:
        raise ConfigError(
            f"run.num_steps was {old.run.num_steps} and is {new.run.num_steps}: with {falls[0]}.schedule={getattr(old, falls[0]).schedule} "
            "the learning rate of every step depends on it, so this would be another run; begin a new one with model.path at one of "
            f"{rundir.checkpoints}"
        )


def differences(old: TrainConfig, new: TrainConfig) -> Iterator[str]:
    """A line for every key that has another value."""
    values = [{dotted(path): _at(tree, path) for path in leaves(tree)} for tree in (old.model_dump(), new.model_dump())]
    for key in sorted(values[0].keys() | values[1].keys()):
        was, now = (inline(side[key]) if key in side else "nothing" for side in values)
        if was != now:
            yield f"{key} was {was} and is {now}"


def _at(tree: object, path: Sequence[str | int]) -> object:
    for part in path:
        tree = tree[part]  # type: ignore[index]
    return tree
