"""Algorithms × seeds on the recheck task: the first batch whose reward reaches a threshold, as a table.

All start from one base model. Dynamic sampling is off, so that every algorithm sees as many samples per batch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
from demo import ROOT, metrics_of, train
from task import RECHECK


def first_reaching(run: Path, threshold: float) -> int | None:
    """Counted from 1; None when no batch does."""
    rewards = [step["rollout/reward"] for step in metrics_of(run)]
    return next((i for i, reward in enumerate(rewards, 1) if reward >= threshold), None)


def clipped_shares(runs: list[Path], num_steps: int) -> tuple[float, float]:
    """Share of clipped tokens among the recheck tokens, and among all others, over the first steps of some runs."""
    clipped: dict[bool, list[bool]] = {True: [], False: []}
    for run in runs:
        for file in sorted((run / "ledger").glob("step-*.parquet"))[:num_steps]:
            for row in pq.read_table(file, columns=["tokens", "loss_weights", "clipped"]).to_pylist():
                for token, weight, was_clipped in zip(row["tokens"], row["loss_weights"], row["clipped"], strict=True):
                    if weight:
                        clipped[token == RECHECK].append(was_clipped)
    return mean(clipped[True]), mean(clipped[False])


def finished_run(algorithm: str, seed: int, args: argparse.Namespace) -> Path:
    """The run of this algorithm and seed, made if it is not there."""
    run = ROOT / "runs" / f"recheck-compare-{algorithm}-{seed}"
    if not run.exists():
        settings = [f"algorithm.name={algorithm}", "algorithm.dynamic_sampling=false", f"run.num_steps={args.steps}"]
        train(run.name, args.recheck_rate, seed, settings)
    if len(metrics_of(run)) != args.steps:
        raise SystemExit(f"{run} has {len(metrics_of(run))} of {args.steps} steps; remove it, and this makes it again")
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=["cispo", "dapo", "grpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--recheck-rate", type=float, default=0.03)
    parser.add_argument("--steps", type=int, default=28)
    args = parser.parse_args()

    rows = []
    every_step: list[dict[str, float]] = []
    for algorithm in args.algorithms:
        runs = [finished_run(algorithm, seed, args) for seed in args.seeds]
        reached = [first_reaching(run, args.threshold) for run in runs]
        metrics = [metrics_of(run) for run in runs]
        every_step += [step for steps in metrics for step in steps]
        last = mean(step["rollout/reward"] for steps in metrics for step in steps[-4:])
        rate = mean(step["rollout/reward/recheck"] for steps in metrics for step in steps[-4:])
        rechecks, others = clipped_shares(runs, num_steps=10)
        cells = ", ".join("–" if r is None else str(r) for r in reached)
        rows.append(f"| {algorithm} | {cells} | {last:.3f} | {rate:.3f} | {rechecks:.2%} | {others:.2%} |")
    seeds = ", ".join(map(str, args.seeds))
    print(
        f"\n| algorithm | first batch with reward ≥ {args.threshold} (seeds {seeds}) | reward, last 4 batches ", end=""
    )
    print("| recheck rate, last 4 | clipped of recheck tokens, first 10 | of other tokens |\n|---|---|---|---|---|---|")
    print("\n".join(rows))
    difference = max(step["train/engine_logprob_diff/max"] for step in every_step)
    log_ratio = max(abs(step["train/first_update/ppo_kl"]) for step in every_step)
    print(f"\nfirst updates, engine against trainer: a token's log-prob differs by {difference:.1e} at most, ", end="")
    print(f"the mean log-ratio by {log_ratio:.1e}")


if __name__ == "__main__":
    main()
