"""What a check found: items, each with a line of summary and what is wrong about it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from sluice.errors import SluiceError

Level = Literal["ok", "warning", "failure", "skipped"]
WORST_LAST: tuple[Level, ...] = ("skipped", "warning", "failure")
SHOWN = 5
"""Rows that a finding lists."""


@dataclass
class Item:
    """One thing that was looked at."""

    name: str
    summary: str = ""
    """What was found, when it is well; why nothing was looked at, when it was skipped."""
    findings: list[tuple[Level, str]] = field(default_factory=list[tuple[Level, str]])
    """What is worth saying beside it, with `ok`; what is wrong, where, and what to do about it."""

    @classmethod
    def skipped(cls, name: str, why: str) -> Item:
        return cls(name, "", [("skipped", why)])

    @property
    def level(self) -> Level:
        """The worst of the findings."""
        found = {level for level, _ in self.findings}
        worst: Level = "ok"
        for level in WORST_LAST:
            worst = level if level in found else worst
        return worst

    def note(self, text: str) -> None:
        self.findings.append(("ok", text))

    def warn(self, text: str) -> None:
        self.findings.append(("warning", text))

    def fail(self, text: str) -> None:
        self.findings.append(("failure", text))

    @contextmanager
    def failing(self) -> Generator[None]:
        """What the block raises on purpose is a failure, and the block ends there."""
        try:
            yield
        except SluiceError as error:
            self.fail(str(error))

    def text(self) -> str:
        """The item as it is printed: a line, and its findings below."""
        head = f"{self.name:<8}  {self.level:<7}  {self.summary}".rstrip()
        below = [
            ("" if level in ("ok", "skipped") else f"{level}: ") + text.replace("\n", "\n" + " " * 12)
            for level, text in self.findings
        ]
        if not self.summary and self.level == "skipped":
            return f"{head}  {below[0]}"
        return "\n".join([head, *(" " * 10 + line for line in below)])


def listed(lines: Sequence[str], total: int | None = None) -> str:
    """The first few, one below the other, and how many more there are (of `total`, or else of the lines)."""
    more = (len(lines) if total is None else total) - len(lines[:SHOWN])
    return "\n".join([*lines[:SHOWN], *([f"… and {more} more"] if more else [])])


def plural(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"
