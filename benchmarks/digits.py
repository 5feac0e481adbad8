"""The reward of the steps that are measured: cheap, and different for every response."""

from __future__ import annotations

from typing import Any


def share_of_digits(prompt: Any, trajectory: Any) -> float:
    return share(trajectory.response)


def share(text: str) -> float:
    return sum(character.isdigit() for character in text) / max(1, len(text))
