"""Where each second of a step of `sluice train` goes: by phase, by torch operator, and by Python function.

The work is that of `step.py`. After some steps that do not count come as many with nothing but the run's own clocks, then as many
under torch's profiler and as many under Python's: both slow down what they watch, so trust the phases' seconds and the others'
shares. On a GPU the operators are its kernels. Rewards are computed in another process, and are seen only as waiting.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sluice  # noqa: F401  before torch: sets GOMP_SPINCOUNT

# isort: split
import torch
from torch.profiler import ProfilerActivity, profile

from measuring import DTYPES, add_cases, parser, reported, rounded
from shapes import SHAPES, save
from sluice.config import TrainConfig
from sluice.configfile import load
from sluice.launch import train
from sluice.tracking.tracker import FileTracker
from step import write_prompts
from step_sluice import ENGINES, force_lengths, settings


class Watched:
    """Steps in four stretches: warm-up, bare, under torch's profiler, under Python's. A stretch ends where a step's line is written."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.ends = {warm_up + steps: self._torch, warm_up + 2 * steps: self._python, warm_up + 3 * steps: self._end}
        self.num_steps = warm_up + 3 * steps
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.operators, self.functions = profile(activities=activities), cProfile.Profile()
        log = FileTracker.log

        def watched(tracker: FileTracker, step: int, metrics: dict[str, float]) -> None:
            log(tracker, step, metrics)
            self.ends.get(step, lambda: None)()

        FileTracker.log = watched  # type: ignore[method-assign]

    def _torch(self) -> None:
        self.operators.start()

    def _python(self) -> None:
        self.operators.stop()
        self.functions.enable()

    def _end(self) -> None:
        self.functions.disable()


def phases(metrics: Path, first: int, steps: int) -> dict[str, float]:
    """Milliseconds per step under each name of `perf/`, in the mean."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()[first : first + steps]]
    names = [name for name in lines[0] if name.startswith("perf/") and name.endswith("_s") and "tokens" not in name]
    return {name[5:-2]: rounded(1e3 * sum(line[name] for line in lines) / steps) for name in names}


def operators(watched: profile, steps: int, most: int) -> list[dict[str, Any]]:
    """Those that took longest themselves: milliseconds and calls per step, and the share of all."""
    on_gpu = torch.cuda.is_available()
    events = [(e, e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in watched.key_averages()]
    total = sum(took for _, took in events)
    return [
        {
            "name": e.key[:100],
            "ms": rounded(took / 1e3 / steps),
            "calls": e.count // steps,
            "share": rounded(took / total),
        }
        for e, took in sorted(events, key=lambda pair: -pair[1])[:most]
    ]


def functions(watched: cProfile.Profile, steps: int, most: int) -> list[dict[str, Any]]:
    stats: dict[Any, Any] = pstats.Stats(watched).stats  # type: ignore[attr-defined]
    total = sum(own for _, _, own, _, _ in stats.values())
    longest = sorted(stats.items(), key=lambda item: -item[1][2])[:most]
    return [
        {
            "name": f"{Path(file).name}:{line} {name}" if line else name,
            "ms": rounded(1e3 * own / steps),
            "calls": calls // steps,
            "share": rounded(own / total),
        }
        for (file, line, name), (_, calls, own, _, _) in longest
    ]


def tell(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}: ms a step, share, calls a step")
    for row in rows:
        print(f"  {row['ms']:9.2f} {row['share']:6.1%} {row['calls']:7}  {row['name']}")


def measure(size: str, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder / "model", size)
        told = argparse.Namespace(
            model=folder / "model",
            data=write_prompts(folder / "prompts.jsonl"),
            dtype=args.dtype,
            prompts=args.prompts,
            samples=args.samples,
            longest=args.longest if kind == "rl_like" else args.new_tokens,
            rl_like=kind == "rl_like",
            settings=args.settings,
        )
        with as_before():
            force_lengths(told)
            watched = Watched(args.warm_up, args.steps)
            overrides = [*settings(told, name), f"run.num_steps={watched.num_steps}"]
            train(load(TrainConfig, [], overrides), "measured")
        return {
            "size": size,
            "lengths": kind,
            "dtype": args.dtype,
            "phases_ms": phases(folder / "measured/metrics.jsonl", args.warm_up, args.steps),
            "operators": operators(watched.operators, args.steps, args.most),
            "functions": functions(watched.functions, args.steps, args.most),
        }


@contextmanager
def as_before() -> Generator[None]:
    """What is watched from outside inside is not afterwards."""
    log, generates = FileTracker.log, [engine.generate for engine in ENGINES]
    try:
        yield
    finally:
        FileTracker.log = log  # type: ignore[method-assign]
        for engine, generate in zip(ENGINES, generates, strict=True):
            engine.generate = generate  # type: ignore[method-assign]


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=1)
    add_cases(options, SHAPES, ["1M:uniform"])
    options.add_argument("--dtype", choices=DTYPES, default="float32")
    options.add_argument("--prompts", type=int, default=8, help="per step")
    options.add_argument("--samples", type=int, default=8, help="per prompt")
    options.add_argument("--new-tokens", type=int, default=32, help="of uniform lengths")
    options.add_argument("--longest", type=int, default=512, help="of rl_like lengths")
    options.add_argument("--steps", type=int, default=8, help="of each stretch")
    options.add_argument("--warm-up", type=int, default=3, help="steps that do not count")
    options.add_argument("--most", type=int, default=15, help="operators and functions to name")
    options.add_argument("--settings", nargs="*", default=[], help="of sluice train, such as trainer.layout=rows")
    args = options.parse_args(argv)
    with reported("profiling", args, argv) as said:
        for size, kind in args.cases:
            result = measure(size, kind, args)
            said["results"].append(result)
            print(f"{size} {args.dtype}, {kind} lengths: ms a step")
            for name, took in result["phases_ms"].items():
                print(f"  {took:9.2f}  {name}")
            tell("torch operators", result["operators"])
            tell("Python functions", result["functions"])


if __name__ == "__main__":
    main()
