"""What the checks and the ledger cost: runs of the recheck recipe with both, and with neither, in turn, in one process.

Both make the same steps from the same random weights. Of each step with both it takes the share that `perf/checks_s` and
`perf/record_s` have in it, and the ratio of its time to that of the same step with neither.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import sluice  # noqa: F401  before torch: sets GOMP_SPINCOUNT

# isort: split
from transformers import AutoConfig

from measuring import ROOT, parser, ratios, reported, spread
from shapes import SHAPES
from sluice.checks import CHECKS
from sluice.config import TrainConfig
from sluice.configfile import load
from sluice.launch import train
from sluice.tracking.tracker import FileTracker

sys.path.insert(0, str(ROOT / "examples/recheck"))
from task import write_task

Steps = list[dict[str, float]]


def one_run(folder: Path, size: str, name: str, record: bool, args: argparse.Namespace) -> Steps:
    """The steps of one run; without `record` neither checks nor ledger."""
    settings = [f"model.path={folder / size}", "model.random_weights=true", f"data.path={folder}/task/questions.jsonl"]
    settings += [f"run.folder={folder}", f"run.name={size}-{name}", f"run.num_steps={args.steps}"]
    settings += ["checkpoint.every_steps=null", f"run.num_threads={args.threads}"]
    if size != "demo":
        settings += ["rollout.groups_per_step=8", "trainer.updates_per_batch=1"]
    settings += [] if record else [f"checks.{check}=off" for check in CHECKS]
    write = FileTracker.log_groups
    if not record:
        FileTracker.log_groups = lambda *_: None  # type: ignore[method-assign]
    try:
        with redirect_stdout(StringIO()):
            run = train(load(TrainConfig, [str(ROOT / "recipes/recheck.yaml")], settings + args.settings), "overhead")
    finally:
        FileTracker.log_groups = write  # type: ignore[method-assign]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return steps[1:]  # the first one pays for what is done once


def measure(size: str, args: argparse.Namespace) -> dict[str, Any]:
    both: Steps = []
    neither: Steps = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder / "task", 0.02, seed=0)
        config = AutoConfig.from_pretrained(folder / "task/model")
        if size != "demo":
            config.update({**SHAPES[size], "layer_types": None})
        (folder / "task/model").rename(folder / size)
        config.save_pretrained(folder / size)
        for i in range(args.rounds):
            both += one_run(folder, size, f"both-{i}", True, args)
            neither += one_run(folder, size, f"neither-{i}", False, args)
    seconds = [step["perf/step_s"] for step in both]
    return {
        "size": size,
        "step_s": spread(seconds),
        "checks_share": spread([step["perf/checks_s"] / step["perf/step_s"] for step in both]),
        "both_over_neither": ratios(seconds, [step["perf/step_s"] for step in neither]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--sizes", nargs="+", choices=["demo", *SHAPES], default=["demo"])
    options.add_argument("--steps", type=int, default=3, help="of each run; the first is not timed")
    options.add_argument("--settings", nargs="*", default=[], help="of sluice train, such as rollout.groups_per_step=8")
    args = options.parse_args(argv)
    with reported("overhead", args, argv) as said:
        for size in args.sizes:
            found = measure(size, args)
            said["results"].append(found)
            step, checks, ratio = (found[name]["median"] for name in ("step_s", "checks_share", "both_over_neither"))
            print(
                f"{size}: a step takes {step:.3f} s, of which checks {checks:.2%}; with them and the ledger, which is "
                f"written beside the next rollout, it takes {ratio:.3f} of the time with neither"
            )


if __name__ == "__main__":
    main()
