"""Train the recheck task in every mode that sluice has, and put the curves side by side.

    python examples/recheck/modes.py                 all modes
    python examples/recheck/modes.py sync async_1    some of them

Each is the recipe with a few settings more. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from statistics import mean, median

from demo import ROOT, metrics_of, train

RECIPE = ["run.num_steps=40", "run.stop_at_reward=0.85", "run.num_threads=1"]
APART = ["engine.process=own", "engine.num_threads=1"]
RANKS = ["trainer.name=fsdp", "trainer.num_ranks=2", "trainer.num_threads=1"]
VLLM = ["engine.name=vllm", "engine.python=.venv-vllm/bin/python", "engine.num_threads=1"]
"""`make vllm` makes what it runs in."""
MODES = {
    "sync": [],
    "async_1": [*APART, "rollout.max_staleness=1"],
    "async_2": [*APART, "rollout.max_staleness=2"],
    "replicas": [*APART, "engine.replicas=2", "rollout.max_staleness=1"],
    "fsdp": [*APART, *RANKS, "rollout.max_staleness=1"],
    "ray": [*APART, *RANKS, "rollout.max_staleness=1", "engine.replicas=2", "placement.name=ray"],
    "vllm": [*VLLM],
    "vllm_async_1": [*VLLM, "rollout.max_staleness=1"],
}
"""Settings of each, besides `RECIPE`."""


def run_of(mode: str) -> Path:
    shutil.rmtree(ROOT / "runs" / f"mode-{mode}", ignore_errors=True)
    return train(f"mode-{mode}", 0.03, 0, [*RECIPE, *MODES[mode]])


def told(run: Path) -> dict[str, object]:
    steps = metrics_of(run)
    later = steps[1:] or steps  # the first step starts processes
    return {
        "rewards": [round(step["rollout/reward"], 3) for step in steps],
        "steps": len(steps),
        "step_s": round(median(step["perf/step_s"] for step in later), 3),
        "rollout_s": round(median(step["perf/rollout_s"] for step in later), 3),
        "train_s": round(median(step["perf/train_s"] for step in later), 3),
        "staleness": round(mean(step.get("rollout/staleness/mean", 0.0) for step in steps), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", choices=[*MODES, []], help="left out, all")
    found = {mode: told(run_of(mode)) for mode in parser.parse_args().modes or MODES}
    print(f"\n{'mode':10} steps to 0.85   step s  rollout s  train s  staleness")
    for mode, figures in found.items():
        columns = (figures[name] for name in ("steps", "step_s", "rollout_s", "train_s", "staleness"))
        print("{:10} {:13} {:8} {:10} {:8} {:10}".format(mode, *columns))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
