"""Algorithms × seeds on the recheck task: the first batch whose reward reaches a threshold, as a table.

All start from one base model. Dynamic sampling is off, so that every algorithm sees as many samples per batch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent))
from demo import ROOT, metrics_of, train


def first_reaching(run: Path, threshold: float) -> int | None:
    """Counted from 1; None when no batch does."""
    rewards = [step["rollout/reward"] for step in metrics_of(run)]
    return next((i for i, reward in enumerate(rewards, 1) if reward >= threshold), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=["cispo", "dapo", "grpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--recheck-rate", type=float, default=0.03)
    parser.add_argument("--steps", type=int, default=28)
    args = parser.parse_args()

    rows = []
    for algorithm in args.algorithms:
        runs = []
        for seed in args.seeds:
            run = ROOT / "runs" / f"recheck-compare-{algorithm}-{seed}"
            if not run.exists():
                settings = [
                    f"algorithm.name={algorithm}",
                    "algorithm.dynamic_sampling=false",
                    f"run.num_steps={args.steps}",
                ]
                train(run.name, args.recheck_rate, seed, settings)
            runs.append(run)
        reached = [first_reaching(run, args.threshold) for run in runs]
        metrics = [metrics_of(run) for run in runs]
        last = mean(step["rollout/reward"] for steps in metrics for step in steps[-4:])
        rate = mean(step["rollout/reward/recheck"] for steps in metrics for step in steps[-4:])
        clipped = mean(step["train/pg_clipfrac"] for steps in metrics for step in steps)
        cells = ", ".join("–" if r is None else str(r) for r in reached)
        rows.append(f"| {algorithm} | {cells} | {last:.3f} | {rate:.3f} | {clipped:.5f} |")
    seeds = ", ".join(map(str, args.seeds))
    print(
        f"\n| algorithm | first batch with reward ≥ {args.threshold} (seeds {seeds}) | reward, last 4 batches ", end=""
    )
    print("| recheck rate, last 4 | clip fraction, whole run |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
