"""Which run folder is gone on in, with which config, and what of that config is written there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sluice.config import TrainConfig
from sluice.configfile import Resolved, dump, load
from sluice.configsafety import RESUMABLE
from sluice.configtree import COMMAND_LINE, Node, dotted, inline, leaves, override
from sluice.describe import describe
from sluice.errors import ConfigError
from sluice.tracking.rundir import RunDir, patiently, write_atomically
from sluice.types import Group, Sample


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
    new = load(TrainConfig, [str(rundir.config)], [*_choices_made_anew(rundir, old, settings), *settings])
    _refuse_other(rundir, old, new.config)
    return new, rundir


def _choices_made_anew(rundir: RunDir, old: TrainConfig, settings: Sequence[str]) -> Iterator[str]:
    """Settings that empty a section of which `settings` choose another kind: the keys in the folder are of the old kind.

    Raises ConfigError for a section of which there can be no other.
    """
    given = Node({}, COMMAND_LINE)
    for setting in settings:
        given = override(given, setting)
    for section in ("engine", "trainer", "placement"):
        was, now = getattr(old, section).name, given.find((section, "name"))
        if now is None or now.value == was:
            continue
        if not f"{section}.".startswith(RESUMABLE):
            raise _other_config(rundir, [f"{section}.name was {was} and is {now.value}"])
        yield f"{section}=null"


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
        raise _other_config(rundir, different)
    falls = [key for key in ("trainer", "critic") if getattr(getattr(old, key), "schedule", "constant") != "constant"]
    if falls and old.run.num_steps != new.run.num_steps:
        raise ConfigError(
            f"run.num_steps was {old.run.num_steps} and is {new.run.num_steps}: with {falls[0]}.schedule={getattr(old, falls[0]).schedule} "
            "the learning rate of every step depends on it, so this would be another run; begin a new one with model.path at one of "
            f"{rundir.checkpoints}"
        )


def _other_config(rundir: RunDir, different: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{rundir.path} was run with another config: {'; '.join(different[:4])}"
        + (f"; and {len(different) - 4} more" if len(different) > 4 else "")
        + f". Only {', '.join(key.removesuffix('.') for key in RESUMABLE)} may change when a run goes on; to begin a new run "
        f"from its weights, set model.path to one of {rundir.checkpoints}"
    )


def nothing_left(rundir: RunDir, step: int, config: TrainConfig) -> str:
    """Why a run whose checkpoint is of `step` does not go on."""
    was, now = config_of(rundir).run.num_steps, config.run.num_steps
    if step < now:
        return (
            f"{rundir.path} has ended after {step} steps, which reached run.stop_at_reward={config.run.stop_at_reward:g}; with a "
            "higher one, or null, it would go on"
        )
    if step < was:
        return (
            f"{rundir.path} has made {step} of its {was} steps, and run.num_steps={now} asks for no more: nothing was done. Leave it "
            "out to go on to the end, or set a higher one"
        )
    return f"{rundir.path} has ended after {step} steps; with a higher run.num_steps it would go on"


def differences(old: TrainConfig, new: TrainConfig) -> Iterator[str]:
    """A line for every key that has another value."""
    before, after = _values(old), _values(new)
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key, "nothing"), after.get(key, "nothing")
        if was != now:
            yield f"{key} was {was} and is {now}"


def _values(config: TrainConfig) -> dict[str, str]:
    tree = config.model_dump()
    return {dotted(path): inline(_at(tree, path)) for path in leaves(tree)}


def _at(tree: object, path: Sequence[str | int]) -> object:
    for part in path:
        tree = tree[part]  # type: ignore[index]
    return tree


class SettingsTracker:
    """Writes the settings that a run goes on with into its folder, when the first step is made with them: a try that made none leaves
    the folder's as they were."""

    def __init__(
        self, rundir: RunDir, resolved: Resolved[TrainConfig], step: int, tell: Callable[[str, str], None]
    ) -> None:
        """`step` is the last one that was made before; `tell` takes kind and text of an event."""
        self._rundir, self._step, self._tell = rundir, step, tell
        self._wait_s = resolved.config.run.disk_wait_s
        self._explained = explained_since(rundir, resolved.config, step)
        self._config = dump(Resolved(resolved.config, origins_since(rundir, resolved, step)))
        self._is_written = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if not self._is_written:
            for path, text in ((self._rundir.explained, self._explained), (self._rundir.config, self._config)):
                write = partial(write_atomically, path, text.encode())
                patiently(write, str(path), self._wait_s, partial(self._tell, "disk_full"))
        self._is_written = True

    def log_groups(
        self, step: int, groups: Sequence[Group], samples: Sequence[Sample], fingerprint: str | None = None
    ) -> None:
        """They are no settings."""

    def event(self, kind: str, message: str, **details: Any) -> None:
        """It is no setting."""

    def close(self) -> None:
        """Nothing is open."""


def explained_since(rundir: RunDir, config: TrainConfig, step: int) -> str:
    """What explained.txt has to say when a run goes on after `step`: what it said, and from where on something else holds."""
    now = describe(config) + "\n"
    said = rundir.explained.read_text() if step and rundir.explained.exists() else ""
    if not said or said.endswith(now):
        return said or now
    return f"{said}\nfrom step {step + 1} on\n{now}"


def origins_since(rundir: RunDir, resolved: Resolved[TrainConfig], step: int) -> dict[str, str]:
    """Where each value was set: as the folder's config says of those that are the same, and of others from which step on."""
    old = load(TrainConfig, [str(rundir.config)])
    lines, before, after = rundir.config.read_text().splitlines(), _values(old.config), _values(resolved.config)

    def recorded(origin: str) -> str:
        file, _, number = origin.rpartition(":")
        if file != str(rundir.config):
            return origin
        _, marked, comment = lines[int(number) - 1].rpartition("  # ")
        return comment if marked else origin

    since = f", from step {step + 1} on" if step else ""
    return {
        key: recorded(old.origins[key]) if before.get(key) == after[key] else f"{origin}{since}"
        for key, origin in resolved.origins.items()
    }
