"""How time and memory grow with the number of samples, their length, the vocabulary, and the rows of the data.

Every point is a process of its own. Those of the first three make steps of `sluice train` with random weights, all
responses as long as allowed; samples, length and vocabulary grow one at a time from 32 samples × 32 tokens × 512 words.
Those of the rows open a JSONL file as `sluice train` does, which reads and checks every row, and draw a thousand prompts
in the order of an epoch.

`memory_mib` is how far the process's memory rose at most above what it was before the first step (or before the file
was opened). What is needed once, such as libraries that are loaded in the first step, is in it too; so
`growth`, which compares neighbouring points, gives how many times the size and the time, and the memory of each one more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import sluice  # noqa: F401  before torch: sets GOMP_SPINCOUNT

# isort: split
from children import Child
from measuring import parser, reported, rounded, shown, spread
from shapes import SHAPES, save

HERE = Path(__file__).resolve().parent
BASE = {"samples": 32, "length": 32, "vocabulary": 512}
GROUP = 8
WARM_UP = 2
Measured = dict[str, Any]


def write_rows(path: Path, num: int) -> Path:
    with open(path, "w") as file:
        for i in range(num):
            file.write(json.dumps({"prompt": f"{i % 100} + {i // 100 % 100} = ", "answer": f"row {i}"}) + "\n")
    return path


def step_point(folder: Path, what: str, number: int, args: argparse.Namespace) -> Measured:
    """Steps of `sluice train` with one of the three settings at `number`."""
    point = {**BASE, what: number}
    model = save(folder / f"model-{point['vocabulary']}", args.size, weights=False, vocab_size=point["vocabulary"])
    data = write_rows(folder / "prompts.jsonl", 1000)
    groups = max(1, point["samples"] // GROUP)
    command = [sys.executable, HERE / "step_sluice.py", "--model", model, "--data", data, "--dtype", "float32"]
    command += ["--prompts", groups, "--samples", point["samples"] // groups, "--longest", point["length"]]
    with Child([*command, "model.random_weights=true", *args.settings], args.threads) as child:
        child.ask(steps=WARM_UP)
        answer = child.ask(steps=args.rounds)
        split = {name: rounded(value) for name, value in answer["split"].items()}
        rise = answer["peak_mib"] - child.first["resident_mib"]
        return {"step_s": spread(answer["seconds"]), "split_s": split, "memory_mib": rounded(rise)}


def rows_point(folder: Path, num: int, args: argparse.Namespace) -> Measured:
    data = write_rows(folder / "rows.jsonl", num)
    answers: list[dict[str, float]] = []
    for _ in range(args.openings):
        with Child([sys.executable, HERE / "open_prompts.py", data], args.threads) as child:
            answers.append(child.first)
    rise = fmean(answer["peak_mib"] - answer["resident_mib"] for answer in answers)
    return {"open_s": spread([answer["seconds"] for answer in answers]), "memory_mib": rounded(rise)}


def grown(what: str, numbers: Sequence[int], measure: Callable[[int], Measured]) -> Measured:
    """All points of one kind, and how they compare."""
    points: list[Measured] = []
    for number in numbers:
        points.append({what: number, **measure(number)})
        tell(what, points[-1])
    return {"grows": what, "points": points, "growth": [compared(what, *pair) for pair in pairwise(points)]}


def compared(what: str, smaller: Measured, larger: Measured) -> Measured:
    time = "open_s" if what == "rows" else "step_s"
    return {
        what: rounded(larger[what] / smaller[what]),
        "time": rounded(larger[time]["median"] / smaller[time]["median"]),
        "mib_per_added": rounded((larger["memory_mib"] - smaller["memory_mib"]) / (larger[what] - smaller[what])),
    }


def tell(what: str, point: Measured) -> None:
    taken = shown(point["open_s" if what == "rows" else "step_s"], 3)
    print(f"{point[what]:>9,} {what:11} {taken} s, memory rises by {point['memory_mib']:,.0f} MiB", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--size", choices=SHAPES, default="1M")
    options.add_argument("--samples", nargs="*", type=int, default=[16, 64, 256])
    options.add_argument("--length", nargs="*", type=int, default=[16, 64, 256])
    options.add_argument("--vocabulary", nargs="*", type=int, default=[512, 8192, 65536])
    options.add_argument("--rows", nargs="*", type=int, default=[1_000, 1_000_000])
    options.add_argument("--openings", type=int, default=1, help="of each file of rows")
    options.add_argument("--settings", nargs="*", default=[], help="of sluice train, such as trainer.layout=rows")
    args = options.parse_args(argv)
    with reported("growth", args, argv) as said, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what in BASE:
            if numbers := getattr(args, what):
                said["results"].append(grown(what, numbers, lambda n, what=what: step_point(folder, what, n, args)))
        if args.rows:
            said["results"].append(grown("rows", args.rows, lambda num: rows_point(folder, num, args)))


if __name__ == "__main__":
    main()
