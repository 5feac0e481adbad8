"""The deaths of what an engine runs in, processes or servers one after the other: each is told to somebody, and by its number counted once."""

from __future__ import annotations

from pathlib import Path

from sluice.errors import EngineLostError


class Deaths:
    def __init__(self) -> None:
        self.log: Path | None = None
        """File that they print to."""
        self.num_started = 0
        """Which is the number of the last one too."""
        self._untold: EngineLostError | None = None
        """The end of the last one, as long as nobody was told."""

    def count_start(self) -> int:
        """Gives the number of the one to be started. Raises the end of the last one, if nobody was told."""
        loss, self._untold = self._untold, None
        if loss:
            raise loss
        self.num_started += 1
        return self.num_started

    def keep(self, cause: str, number: int) -> None:
        """For whoever asks next."""
        self._untold = self._loss(cause, number)

    def told(self, cause: str, number: int) -> EngineLostError:
        """To be raised; nobody else has to be told of it."""
        if self._untold and self._untold.process == number:
            self._untold = None
        return self._loss(cause, number)

    def last(self, otherwise: str) -> EngineLostError:
        """To be raised where none runs: how the last one ended, or `otherwise` if that was told."""
        loss, self._untold = self._untold, None
        return loss or self._loss(otherwise, self.num_started)

    @property
    def see(self) -> str:
        """Behind what is said of an error: where there is more of it."""
        return f"; see {self.log}" if self.log and self.log.exists() and self.log.stat().st_size else ""

    def _loss(self, cause: str, number: int) -> EngineLostError:
        return EngineLostError(f"{cause}{self.see}", number)
