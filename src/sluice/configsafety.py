"""The sections of the config that keep a run safe: checkpoints, checks, the watchdog."""

from __future__ import annotations

from pydantic import PositiveInt

from sluice.configbase import Section


class CheckpointSection(Section):
    every_steps: PositiveInt | None = None
    """Steps between checkpoints; one is always written at the end."""
