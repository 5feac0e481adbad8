"""The sections of the config that keep a run safe: checkpoints, checks, the watchdog."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from sluice.configbase import Section


class CheckpointSection(Section):
    every_steps: PositiveInt | None = None
    """Steps between checkpoints; one is always written at the end."""


class WatchdogSection(Section):
    warn_after_s: Annotated[float, Field(ge=0.1, allow_inf_nan=False)] | None = 120.0
    """Seconds after which what holds the run up is named, on the console and in events.jsonl; then after twice as many, and so
    on. null: never."""
