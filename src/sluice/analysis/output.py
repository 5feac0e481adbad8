"""Where the figures go: the console, and a JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from sluice.tracking.rundir import finite, write_atomically

PLAIN_WIDTH = 160
"""Columns where there is no terminal: a file or a pipe has no width to keep."""


def show(parts: Iterable[RenderableType]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    for part in parts:
        console.print(part)


def write_json(path: Path, result: Any) -> None:
    """A dataclass, or a list of them, by the names of its fields; what is no finite number becomes null."""
    plain = [asdict(item) for item in result] if isinstance(result, list) else asdict(result)
    write_atomically(path, json.dumps(finite(plain), allow_nan=False, ensure_ascii=False, indent=1).encode() + b"\n")
