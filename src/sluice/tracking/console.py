"""A run on the terminal: one line per step and a bar with the time left; plain lines where there is no terminal."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from sluice.types import Group, Sample

LINES_PER_HEADER = 25
NO_VALUE = "–"


@dataclass(frozen=True)
class _Column:
    title: str
    metric: str
    format: str = ".3f"
    min_width: int = 7

    @property
    def width(self) -> int:
        return max(len(self.title), self.min_width)

    def cell(self, metrics: dict[str, float]) -> str:
        value = metrics.get(self.metric)
        if value is None:  # a reward of several named parts is their sum
            parts = [part for name, part in metrics.items() if name.startswith(f"{self.metric}/")]
            value = sum(parts) if parts else None
        text = NO_VALUE if value is None else format(value, self.format)
        return text.rjust(self.width)


COLUMNS = (
    _Column("reward", "rollout/reward"),
    _Column("length", "rollout/response_len/mean", ".1f"),
    _Column("loss", "train/loss", ".4f"),
    _Column("reward/turns", "rollout/reward/turns"),
    _Column("ppo_kl", "train/ppo_kl", ".1e", 8),
    _Column("ref_kl", "train/ref_kl", ".1e", 8),
    _Column("clipped", "train/pg_clipfrac", ".2%"),
    _Column("entropy", "train/entropy"),
    _Column("grad", "train/grad_norm", ".3g"),
    _Column("expl_var", "train/explained_variance", ".2f"),
    _Column("stale", "rollout/staleness/mean", ".2f", 5),
    _Column("tok/s", "perf/tokens_per_s", ",.0f"),
    _Column("s/step", "perf/step_s", ".3g", 6),
)
"""Shown from the first step on that has the metric; the loss only without a reward, beside which it says nothing."""


class ConsoleTracker:
    """Prints steps and events. Times are of the wall clock, from construction on.

    `extra` are metrics with a column of their own, e.g. `rollout/reward/math`.
    """

    def __init__(self, num_steps: int, extra: Sequence[str] = (), console: Console | None = None) -> None:
        self.num_steps = num_steps
        self.extra = [_Column(name.removeprefix("rollout/"), name) for name in extra]
        self.console = console or Console(highlight=False)
        self.columns: list[_Column] = []
        self._seen: dict[str, float] = {}
        self._first_step = 0
        self._start = time.monotonic()
        self._num_lines = 0
        self._bar: Progress | None = None
        if self.console.is_terminal:
            columns = BarColumn(), TextColumn("step {task.completed}/{task.total}, {task.fields[left]} left")
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("", total=num_steps, left=NO_VALUE)
            self._bar.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._seen.update(metrics)
        columns = self._columns_of(self._seen)
        if columns != self.columns:
            self.columns, self._num_lines = columns, 0
        if self._num_lines % LINES_PER_HEADER == 0:
            titles = [column.title.rjust(column.width) for column in self.columns]
            self._print(self._line("step", titles, "left"), "bold")
        made = step - self._first_step
        left = _duration((time.monotonic() - self._start) / made * (self.num_steps - step)) if made > 0 else NO_VALUE
        self._print(self._line(f"{step}/{self.num_steps}", [column.cell(metrics) for column in self.columns], left))
        self._num_lines += 1
        if self._bar:
            self._bar.update(self._task, completed=step, left=left)

    def log_groups(
        self, step: int, groups: Sequence[Group], samples: Sequence[Sample], fingerprint: str | None = None
    ) -> None:
        """Samples are for the ledger."""

    def event(self, kind: str, message: str, **details: Any) -> None:
        if kind == "resumed":  # the time that is left is told by the steps that this process has made
            self._first_step, self._start = details["step"], time.monotonic()
        self._print(f"{kind}: {message}", "yellow")

    def close(self) -> None:
        if self._bar:
            self._bar.stop()

    def _columns_of(self, metrics: dict[str, float]) -> list[_Column]:
        hidden = {"train/loss"} if "rollout/reward" in metrics else set()
        chosen = [column for column in COLUMNS if column.metric in metrics.keys() - hidden]
        after_reward = 1 if "rollout/reward" in metrics else 0
        return chosen[:after_reward] + self.extra + chosen[after_reward:]

    def _line(self, step: str, cells: Sequence[str], left: str) -> str:
        return "  ".join([step.rjust(2 * len(str(self.num_steps)) + 1), *cells, left.rjust(7)])

    def _print(self, line: str, style: str = "") -> None:
        line = re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", line)  # an error may quote a sample, and a sample is anything
        line = line.encode(self.console.encoding, "replace").decode(self.console.encoding)
        self.console.print(Text(line, style=style), soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
