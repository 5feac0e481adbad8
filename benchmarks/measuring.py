"""What the benchmarks share: sides timed in turn, medians with their spread, and the one JSON line at the end.

A machine is never as quiet as one thinks, so sides are not timed one after the other but in turn, and compared pair by
pair: what slows the machine down for a while slows all sides of a round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Figures = dict[str, float | int]
LENGTHS = ["uniform", "rl_like"]
DTYPES = ["float32", "bfloat16"]


def parser(description: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """With the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--rounds", type=positive, default=rounds, help=f"times that every side is timed, in turn; left out, {rounds}"
    )
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch, for all sides")
    return made


def positive(word: str) -> int:
    if not word.isdecimal() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"{word} should be a whole number above 0")
    return int(word)


def add_cases(options: argparse.ArgumentParser, sizes: Collection[str], default: Sequence[str]) -> None:
    """`--cases` as pairs of a size and a kind of lengths."""

    def case(word: str) -> tuple[str, str]:
        size, _, kind = word.partition(":")
        if size not in sizes or kind not in LENGTHS:
            raise argparse.ArgumentTypeError(
                f"{word} is not one of {', '.join(sizes)}, a colon, and {' or '.join(LENGTHS)}"
            )
        return size, kind

    made = [case(word) for word in default]
    said = " ".join(default)
    options.add_argument("--cases", nargs="*", type=case, default=made, help=f"SIZE:LENGTHS; left out, {said}")


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(sides: Mapping[str, Callable[[], float]], rounds: int, warm_up: bool = True) -> dict[str, list[float]]:
    """What the sides say of themselves (seconds, say), each asked once a round; the i-th figures of all were taken together."""
    if warm_up:
        for side in sides.values():
            side()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            gc.collect()  # what one side leaves behind is not collected in another's time
            found[name].append(side())
    return found


def spread(values: Sequence[float]) -> Figures:
    """Four digits of the median, and how far apart the values lie."""
    return {
        "median": rounded(median(values)),
        "min": rounded(min(values)),
        "max": rounded(max(values)),
        "runs": len(values),
    }


def ratios(above: Sequence[float], below: Sequence[float]) -> Figures:
    """Spread of the ratios within the pairs, which is not the ratio of the medians."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def shown(figures: Mapping[str, Any], digits: int = 0) -> str:
    """`median (min–max)`, for people."""
    return f"{figures['median']:,.{digits}f} ({figures['min']:,.{digits}f}–{figures['max']:,.{digits}f})"


@contextmanager
def reported(name: str, args: argparse.Namespace, argv: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Sets the threads; what is put into the dict is printed at the end as one JSON object on one line.

    With it go the versions, the machine, the command, and how busy the machine was before and after: with a load above
    the number of cores the figures are not worth much.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    said: dict[str, Any] = {
        "benchmark": name,
        "results": [],
        "skipped": [],
        "versions": {"commit": commit(), **versions()},
    }
    load = [os.getloadavg()[0]]
    try:
        yield said
    finally:
        torch.set_num_threads(threads)
    load.append(os.getloadavg()[0])
    words = sys.argv[1:] if argv is None else argv
    said |= {"threads": args.threads, "cpu": cpu(), "load_before_and_after": load}
    said["variables"] = {name: os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    said["command"] = shlex.join(["python", f"benchmarks/{name}.py", *words])
    print(json.dumps(said), flush=True)


def skip(said: dict[str, Any], what: str) -> None:
    """Tell people, and the JSON line, of what was left out."""
    print(f"skipped: {what}")
    said["skipped"].append(what)


def versions(packages: Sequence[str] = ("sluice", "torch", "transformers")) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """Of this repository, with a `+` when files differ from it."""
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return said.stdout.strip() or None


def cpu() -> dict[str, Any]:
    """The processor's name, its cores, and what torch makes of it."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "name": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
