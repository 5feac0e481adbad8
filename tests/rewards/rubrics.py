"""Prompts, answers, and users' rewards (`users_rewards.py`) for the tests of this folder."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sluice.rewards.rubric import Rubric
from sluice.rewards.spec import RewardSpec
from sluice.types import Completion, Prompt, Trajectory, Turn


@contextmanager
def rubric_of(*specs: RewardSpec, num_workers: int = 1, log: Path | None = None) -> Iterator[Rubric]:
    rubric = Rubric(specs, num_workers, log)
    try:
        yield rubric
    finally:
        rubric.close()


def users(function: str, label: str = "part", weight: float = 1.0, timeout_s: float = 10.0) -> RewardSpec:
    return RewardSpec(label, f"users_rewards:{function}", weight, timeout_s)


def a_prompt(reference: object = None, **metadata: object) -> Prompt:
    return Prompt("row-7", [{"role": "user", "content": "?"}], reference, metadata=metadata, where="data.jsonl:7")


def an_answer(text: str) -> Trajectory:
    return Trajectory([Turn([1], Completion([2], [-0.5], "stop", [0], 1.0, text))])


def score_all(rubric: Rubric, attempts: Sequence[tuple[Prompt, str]]) -> list[Trajectory]:
    """All attempts at once, from one event loop."""

    async def run() -> list[Trajectory]:
        trajectories = [an_answer(text) for _, text in attempts]
        await asyncio.gather(*(rubric.score(prompt, t) for (prompt, _), t in zip(attempts, trajectories)))
        return trajectories

    return asyncio.run(run())


def score(rubric: Rubric, prompt: Prompt, text: str = "") -> Trajectory:
    return score_all(rubric, [(prompt, text)])[0]
