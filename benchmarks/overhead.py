"""What the checks and the ledger cost: runs of the recheck recipe with both, and with neither, in turn, in one process.

Both make the same steps from the same random weights. Of each step with both it takes the share that `perf/checks_s` and
`perf/record_s` have in it, and the ratio of its time to that of the same step with neither. The last line is one JSON object
with the medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import sluice  # before torch: sets GOMP_SPINCOUNT

# isort: split
import torch
from transformers import AutoConfig

from sluice.checks import CHECKS
from sluice.config import TrainConfig
from sluice.configfile import load
from sluice.launch import train
from sluice.tracking.tracker import FileTracker

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples/recheck"))
from task import write_task

ROOT = Path(__file__).resolve().parents[1]

SIZES: dict[str, dict[str, Any]] = {
    "demo": {},
    "100M": {
        "hidden_size": 896,
        "num_hidden_layers": 12,
        "intermediate_size": 2432,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}


def steps_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def one_run(folder: Path, size: str, num_steps: int, name: str, record: bool) -> list[dict[str, float]]:
    """The steps of one run; without `record` neither checks nor ledger."""
    model = folder / size
    settings = [f"model.path={model}", "model.random_weights=true", f"data.path={folder}/task/questions.jsonl"]
    settings += [
        f"run.folder={folder}",
        f"run.name={size}-{name}",
        f"run.num_steps={num_steps}",
        "checkpoint.every_steps=null",
    ]
    if size != "demo":
        settings += ["rollout.groups_per_step=8", "trainer.updates_per_batch=1"]
    settings += [] if record else [f"checks.{check}=off" for check in CHECKS]
    write = FileTracker.log_groups
    if not record:
        FileTracker.log_groups = lambda *_: None  # type: ignore[method-assign]
    try:
        with redirect_stdout(StringIO()):
            run = train(load(TrainConfig, [str(ROOT / "recipes/recheck.yaml")], settings), "overhead")
    finally:
        FileTracker.log_groups = write  # type: ignore[method-assign]
    return steps_of(run)[1:]  # the first one pays for what is done once


def measure(size: str, num_steps: int, repeats: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder / "task", 0.02, seed=0)
        config = AutoConfig.from_pretrained(folder / "task/model")
        config.update({**SIZES[size], **({"layer_types": None} if SIZES[size] else {})})
        (folder / "task/model").rename(folder / size)
        config.save_pretrained(folder / size)
        with_both, with_neither = [], []
        for i in range(repeats):
            with_both += one_run(folder, size, num_steps, f"both-{i}", True)
            with_neither += one_run(folder, size, num_steps, f"neither-{i}", False)
    return {
        "step_s": median(step["perf/step_s"] for step in with_both),
        "checks_share": median(step["perf/checks_s"] / step["perf/step_s"] for step in with_both),
        "record_share": median(step["perf/record_s"] / step["perf/step_s"] for step in with_both),
        "ratio": median(
            one["perf/step_s"] / other["perf/step_s"] for one, other in zip(with_both, with_neither, strict=True)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["demo"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    results: dict[str, Any] = {"torch": torch.__version__, "sluice": sluice.__version__, "cpu": platform.processor()}
    for size in args.sizes:
        found = results[size] = measure(size, args.steps, args.repeats)
        print(
            f"{size}: a step takes {found['step_s']:.3f} s, of which checks {found['checks_share']:.2%} and ledger "
            f"{found['record_share']:.2%}; with both it takes {found['ratio']:.3f} of the time with neither"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
