"""What one process can pass through: `sluice train` with real buffer, workers, policies, reward processes, checks and ledger, an engine
that answers at once from a list, and a trainer that does nothing. So a step takes what the driver takes, and nothing else. Beside the
seconds that pass stand those that the process computes, in all its threads: they do not depend on how busy the machine is otherwise, and
since Python runs one thread at a time, no machine with such cores gets more through.

What an engine's answer costs to receive (HTTP, JSON) comes on top where engines are servers.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from measuring import rounded, spread
from profiling import functions
from shapes import VOCABULARY, save
from sluice.config import TrainConfig
from sluice.configfile import load
from sluice.launch import train
from sluice.tracking.tracker import FileTracker
from sluice.types import Sampling
from step import write_prompts

GROUP_SIZE = 16
TOKENS = [32, 512, 4096]
TOKENS_PER_STEP = 2**18
"""So that steps with long responses are not much longer than steps with short ones."""
MOST_GROUPS = 128
WARM_UP = 1
PHASES = ("rollout", "checks", "train", "publish", "record")
_IDS = [3 + i * 7919 % (VOCABULARY - 3) for i in range(2**16)]


def answer(prompt_ids: Sequence[int], sampling: Sampling) -> list[int]:
    """The script of the engine: other tokens for each seed, as many as there may be."""
    start = sampling.seed % (len(_IDS) // 2)
    return _IDS[start : start + sampling.max_new_tokens]


def groups_of(tokens: int) -> int:
    return max(4, min(MOST_GROUPS, TOKENS_PER_STEP // (GROUP_SIZE * tokens)))


def steps_of(
    folder: Path, tokens: int, workers: int, steps: int, watch: cProfile.Profile | None = None
) -> list[dict[str, float]]:
    """Seconds of each step, in all (`step`), computed (`cpu`) and by phase."""
    ends: list[tuple[float, float]] = []
    log = FileTracker.log

    def noted(self: FileTracker, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        ends.append((time.perf_counter(), time.process_time()))
        if watch and step == WARM_UP:
            watch.enable()
        elif watch and step == WARM_UP + steps:
            watch.disable()  # before the report is written

    with tempfile.TemporaryDirectory() as runs, redirect_stdout(StringIO()):
        words = [
            f"model.path={folder / 'model'}",
            f"data.path={folder / 'prompts.jsonl'}",
            "engine={name: scripted, script: driver:answer, max_model_len: 65536}",
            "trainer={name: dry}",
            f"rollout.groups_per_step={groups_of(tokens)}",
            f"rollout.group_size={GROUP_SIZE}",
            f"rollout.max_new_tokens={tokens}",
            "rollout.max_staleness=1",
            "rewards=[{name: digits:share_of_digits}]",
            f"reward_workers={workers}",
            f"run.folder={runs}",
            "run.name=driver",
            f"run.num_steps={WARM_UP + steps}",
            "run.num_threads=1",
            "checkpoint.every_steps=null",
            "watchdog.warn_after_s=null",
            *(f"checks.{name}=off" for name in ("response_length", "repetition", "equal_rewards")),
        ]
        try:
            FileTracker.log = noted  # type: ignore[method-assign]
            run = train(load(TrainConfig, [], words), "driver")
        finally:
            FileTracker.log = log  # type: ignore[method-assign]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    return [
        {"step": end - start, "cpu": cpu_end - cpu_start, **{name: line.get(f"perf/{name}_s", 0.0) for name in PHASES}}
        for ((start, cpu_start), (end, cpu_end)), line in zip(pairwise(ends[WARM_UP - 1 :]), lines, strict=True)
    ]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder / "model", "tiny")
        write_prompts(folder / "prompts.jsonl")
        for tokens in args.tokens:
            for workers in (1, 2):
                found = [s for _ in range(args.rounds) for s in steps_of(folder, tokens, workers, args.steps)]
                results.append(told(tokens, workers, found))
            watch = cProfile.Profile()
            steps_of(folder, tokens, 1, args.steps, watch)
            results[-1]["functions"] = functions(watch, args.steps, 12)
            for row in results[-1]["functions"]:
                print(f"      {row['share']:6.1%}  {row['name']}")
    return results


def told(tokens: int, workers: int, steps: list[dict[str, float]]) -> dict[str, Any]:
    groups = groups_of(tokens)
    phases = {name: rounded(fmean(step[name] for step in steps)) for name in PHASES}
    result = {
        "what": "driver",
        "tokens": tokens,
        "reward_workers": workers,
        "groups_per_step": groups,
        "group_size": GROUP_SIZE,
        "groups_per_s": spread([groups / step["step"] for step in steps]),
        "groups_per_cpu_s": spread([groups / step["cpu"] for step in steps]),
        "tokens_per_s": spread([groups * GROUP_SIZE * tokens / step["step"] for step in steps]),
        "phases_s": phases,
    }
    where = ", ".join(f"{name} {value:.3f}" for name, value in phases.items())
    print(
        f"{groups} groups × {GROUP_SIZE} of {tokens} tokens, reward_workers={workers}: {result['groups_per_s']['median']:.1f} groups/s, "
        f"{result['groups_per_cpu_s']['median']:.1f} per CPU second, {result['tokens_per_s']['median']:,.0f} tokens/s; seconds a step: {where}",
        flush=True,
    )
    return result
