"""Every error that sluice raises on purpose, and the context manager that names the boundary where one arose."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


class SluiceError(Exception):
    """Base of all errors that tell the user what was wrong, where, and what to do; the CLI prints them without a traceback."""


class ConfigError(SluiceError):
    """A setting that is unknown, of the wrong type, or that cannot work together with another."""


class DataError(SluiceError):
    """A data file, or a row of it, that cannot be used."""


class RolloutError(SluiceError):
    """Something failed between a prompt and a scored group."""


class EngineError(RolloutError):
    """The engine could not generate."""


class EngineLostError(EngineError):
    """The engine died, or cannot be reached: what it was asked may be asked of another one, or of it when it is back."""

    def __init__(self, what: str, process: int) -> None:
        """`process`: which of those that the engine has had in its life. By it, a death that several hear of is counted once."""
        super().__init__(what)
        self.process = process


class EngineGoneError(EngineError):
    """There is no engine, and there will be none."""


class PromptTooLongError(EngineError):
    """A prompt that leaves no room for the completion that was asked for."""


class EnvironmentError_(RolloutError):
    """User code that plays the environment raised."""


class RewardError(RolloutError):
    """A reward raised, never returned, or returned something that is no score."""


class PlacementError(SluiceError):
    """A process that could not be started on the machine that it was meant for."""


class CheckError(SluiceError):
    """An invariant of the run that does not hold; what is wrong with it, and where."""


class TrainingError(SluiceError):
    """An update that must not be made."""


class NonFiniteError(TrainingError):
    """A loss or a gradient norm that is not a finite number; the update was refused."""


class RunStopped(SluiceError):
    """Somebody asked the run to leave; nothing went wrong."""


class ReplayError(SluiceError):
    """A step that was made again came out otherwise."""


class RunFolderError(SluiceError):
    """A run folder that is in use, or whose record could not be written or read."""


@contextmanager
def boundary(error: type[SluiceError], what: str) -> Generator[None]:
    """Turn whatever the block raises into `error`, saying at which boundary (`what`) it arose."""
    try:
        yield
    except SluiceError:
        raise
    except (Exception, SystemExit) as cause:  # sys.exit() in user code is not the end of the run
        raise error(f"{what}: {type(cause).__name__}: {cause}") from cause


def notes(error: BaseException) -> list[str]:
    """What was added to it on its way up."""
    return getattr(error, "__notes__", [])


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first single exception in a group of concurrent ones: what the user should see."""
    leaf: BaseException = group
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return leaf  # pyright: ignore[reportUnknownVariableType]
