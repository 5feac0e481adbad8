"""A whole training step of sluice beside one of TRL's GRPOTrainer, both with the CISPO loss.

Both train the same random weights on the same prompts: 8 prompts × 8 samples, one update, AdamW, the share of digits as
reward. Each side is a process that stays alive and makes a few steps when it is its turn, so that the two alternate; a
step lasts from its beginning to the beginning of the next, with everything in between. Ours is the loop of `sluice train`
with its checks, its ledger and its reward process, TRL's is `GRPOTrainer.train()` without a tracker.

Lengths are forced, and the same on both sides: `uniform`, or `rl_like` (log-normal, median 40, 99th percentile 400).
In our engine each request has its limit; in TRL, which generates with one limit for all, a logits processor brings the
end-of-sequence token at the row's length (`peers/step_trl.py`). With `--dtypes bfloat16` ours has BF16 weights with FP32
masters and TRL `bf16=True`, which is autocast over FP32 weights.

`make peers` makes the environment that TRL runs in; without it only our side is timed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

import sluice  # noqa: F401  before torch: sets GOMP_SPINCOUNT

# isort: split
from children import Child
from measuring import DTYPES, ROOT, add_cases, in_turn, parser, ratios, reported, rounded, shown, skip, spread
from shapes import SHAPES, save

HERE = Path(__file__).resolve().parent
STEPS = {"uniform": 4, "rl_like": 1}


class Side:
    """Seconds per step of a child, and where they went."""

    def __init__(self, child: Child, steps: int, warm_up: int) -> None:
        self.child, self.steps = child, steps
        self.splits: list[dict[str, float]] = []
        child.ask(steps=warm_up)

    def __call__(self) -> float:
        answer = self.child.ask(steps=self.steps)
        self.splits.append(answer["split"])
        return fmean(answer["seconds"])

    def split(self) -> dict[str, float]:
        """Seconds per step, in the mean over all rounds."""
        return {name: rounded(fmean(split[name] for split in self.splits)) for name in self.splits[0]}


def write_prompts(path: Path) -> Path:
    drawn = random.Random(0)
    rows = [{"prompt": f"{drawn.randrange(10, 100)} + {drawn.randrange(10, 100)} = "} for _ in range(512)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def commands(folder: Path, kind: str, dtype: str, args: argparse.Namespace) -> dict[str, list[str | Path]]:
    """By side; TRL's only where its environment is there."""
    longest = args.longest if kind == "rl_like" else args.new_tokens
    told = ["--model", folder / "model", "--data", folder / "prompts.jsonl", "--dtype", dtype]
    told += ["--prompts", str(args.prompts), "--samples", str(args.samples), "--longest", str(longest)]
    told += ["--rl-like"] if kind == "rl_like" else []
    found: dict[str, list[str | Path]] = {"sluice": [sys.executable, HERE / "step_sluice.py", *told, *args.settings]}
    if args.trl.exists():
        found["trl"] = [args.trl, HERE / "peers/step_trl.py", *told]
    return found


def measure(size: str, kind: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save(folder / "model", size)
        write_prompts(folder / "prompts.jsonl")
        children = {
            name: stack.enter_context(Child(command, args.threads))
            for name, command in commands(folder, kind, dtype, args).items()
        }
        steps = args.steps or STEPS[kind]
        sides = {name: Side(child, steps, args.warm_up) for name, child in children.items()}
        found = in_turn(sides, args.rounds, warm_up=False)
        result: dict[str, Any] = {"size": size, "lengths": kind, "dtype": dtype, "steps_per_round": steps}
        result["step_s"] = {name: spread(times) for name, times in found.items()}
        if "trl" in found:
            result["trl_over_sluice"] = ratios(found["trl"], found["sluice"])
        result["split_s"] = {name: side.split() for name, side in sides.items()}
        result["versions"] = {name: child.first["versions"] for name, child in children.items()}
        return result


def tell(result: dict[str, Any]) -> None:
    print(f"{result['size']} {result['dtype']}, {result['lengths']} lengths:")
    for name, taken in result["step_s"].items():
        split = ", ".join(f"{part} {value:.3f}" for part, value in result["split_s"][name].items())
        print(f"  {name:7} {shown(taken, 3)} s per step: {split}")
    if "trl_over_sluice" in result:
        print(f"  TRL takes {shown(result['trl_over_sluice'], 2)} times as long", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    add_cases(options, SHAPES, ["1M:uniform", "1M:rl_like", "10M:uniform"])
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    options.add_argument("--prompts", type=int, default=8, help="per step")
    options.add_argument("--samples", type=int, default=8, help="per prompt")
    options.add_argument("--new-tokens", type=int, default=32, help="of uniform lengths")
    options.add_argument("--longest", type=int, default=512, help="of rl_like lengths")
    options.add_argument(
        "--steps", type=int, help="that a side makes in its turn; left out, 4 of uniform lengths, else 1"
    )
    options.add_argument("--warm-up", type=int, default=2, help="steps of each side that are not timed")
    options.add_argument("--trl", type=Path, default=ROOT / ".venv-peers/bin/python", help="python that has TRL")
    options.add_argument("--settings", nargs="*", default=[], help="of sluice train, such as trainer.layout=rows")
    args = options.parse_args(argv)
    with reported("step", args, argv) as said:
        if not args.trl.exists():
            skip(said, f"TRL, since there is no {args.trl}: `make peers` makes it")
        for size, kind in args.cases:
            for dtype in args.dtypes:
                said["results"].append(measure(size, kind, dtype, args))
                tell(said["results"][-1])


if __name__ == "__main__":
    main()
