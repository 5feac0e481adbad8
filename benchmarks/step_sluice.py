"""The side of sluice in `step.py`: `sluice train` in this process, stopped between its steps.

It is the whole loop with its defaults: workers, rewards in a process of their own, all checks, the ledger. Two things
are added from outside: a step begins and ends where its line is written to metrics.jsonl, and each request gets a length
that was drawn before, at which it ends.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import sluice  # noqa: F401  before torch: sets GOMP_SPINCOUNT

# isort: split
from children import Served, StepClock
from measuring import versions
from sluice.config import TrainConfig
from sluice.configfile import load
from sluice.engines.embedded import EmbeddedEngine
from sluice.engines.process import EngineProcess
from sluice.interfaces import Engine
from sluice.launch import train
from sluice.tracking.tracker import FileTracker
from sluice.types import Completion, Sampling
from step_work import lengths_of, options

ENGINES = [EmbeddedEngine, EngineProcess]
SPLIT = ["rollout", "train", "publish", "checks", "record"]


def force_lengths(args: argparse.Namespace) -> None:
    lengths: list[int] = []
    step = 0

    def forced(generate: Callable[..., Awaitable[Completion]]) -> Callable[..., Awaitable[Completion]]:
        async def watched(self: Engine, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
            nonlocal step
            if not lengths:
                lengths.extend(lengths_of(step, args))
                step += 1
            changes = {"max_new_tokens": lengths.pop(), "stop_token_ids": frozenset()}
            return await generate(self, prompt_ids, replace(sampling, **changes))

        return watched

    for engine in ENGINES:
        engine.generate = forced(engine.generate)  # type: ignore[method-assign]


def watch_metrics(clock: StepClock) -> None:
    log = FileTracker.log

    def watched(self: FileTracker, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        clock()

    FileTracker.log = watched  # type: ignore[method-assign]


def settings(args: argparse.Namespace, runs: str) -> list[str]:
    return [
        f"model.path={args.model}",
        f"model.dtype={args.dtype}",
        f"data.path={args.data}",
        f"rollout.groups_per_step={args.prompts}",
        f"rollout.group_size={args.samples}",
        f"rollout.max_new_tokens={args.longest}",
        "rewards=[{name: digits:share_of_digits}]",
        f"run.folder={runs}",
        "run.name=measured",
        "run.num_steps=1000000",
        "checkpoint.every_steps=null",
        "watchdog.warn_after_s=null",
        *args.settings,
    ]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("settings", nargs="*", help="further settings of sluice train")
    args = parser.parse_args()
    served = Served()
    with tempfile.TemporaryDirectory() as runs:
        metrics = Path(runs) / "measured/metrics.jsonl"

        def split(num_steps: int) -> dict[str, float]:
            lines = [json.loads(line) for line in metrics.read_text().splitlines()[-num_steps:]]
            total = {name: sum(line.get(f"perf/{name}_s", 0.0) for line in lines) for name in SPLIT}
            return {name: value / num_steps for name, value in total.items()}

        force_lengths(args)
        watch_metrics(StepClock(served, {"versions": versions()}, split))
        train(load(TrainConfig, [], settings(args, runs)), "measured")


if __name__ == "__main__":
    main()
