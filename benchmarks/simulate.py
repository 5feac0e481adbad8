"""How a run scales, by simulation: the loop, the workers, the buffer and the checks of sluice, in a clock of their own, around engines,
trainers and tools that only take time (`simulated_run.py`).

Without options: tokens per second, staleness and the best share of training GPUs for 8 to 1,024 H100s, in turn on the same GPUs and
asynchronous; what failures cost; and how many tools an agent's environments run at once. Some ten minutes; less with fewer `--gpus`,
`--groups` or `--steps`.

`--calibrate` makes real steps on this machine and prints predicted beside measured. `--driver` measures what one process can pass
through buffer, workers, reward processes and ledger.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import sluice  # noqa: F401  before torch: sets GOMP_SPINCOUNT

# isort: split
import calibration
import driver
from clusters import H100, LENGTHS, MODELS, Cluster, fewest_training_gpus
from measuring import parser, positive, reported, rounded, skip
from simulated_run import Outcome, simulate

SHARES = (1 / 32, 1 / 16, 1 / 10, 1 / 8, 1 / 6, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 2 / 3)
"""Of the GPUs, for training: those that are tried."""
SEARCH_STEPS = 6
"""That count, of the simulations that only look for the best split."""
FAILURES = {f"one per {hours:,} GPU hours": float(hours) for hours in (50_000, 500, 50)}
ENOUGH = 0.95
"""Share of the throughput with tools without end that a number of workers must keep to be enough."""


def outcome(cluster: Cluster) -> Outcome:
    return simulate(cluster.setting())


@dataclass
class Simulations:
    """Each is made once, several of them at a time."""

    pool: Executor | None
    known: dict[Cluster, Outcome] = field(default_factory=dict[Cluster, Outcome])

    def __call__(self, clusters: Iterable[Cluster]) -> list[Outcome]:
        asked = list(clusters)
        new = [cluster for cluster in dict.fromkeys(asked) if cluster not in self.known]
        found = self.pool.map(outcome, new) if self.pool else map(outcome, new)
        self.known |= dict(zip(new, found, strict=True))
        return [self.known[cluster] for cluster in asked]


@contextmanager
def simulations(jobs: int) -> Iterator[Simulations]:
    if jobs == 1:
        yield Simulations(None)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield Simulations(pool)


def splits(cluster: Cluster) -> list[int]:
    """Numbers of training GPUs to try, ascending: the rest makes whole replicas, one at least."""
    whole = cluster.model.replica_gpus
    fewest = fewest_training_gpus(cluster.model, cluster.gpu)
    rounded_up = {math.ceil(max(fewest, share * cluster.gpus) / whole) * whole for share in SHARES}
    return sorted(number for number in rounded_up if number + whole <= cluster.gpus)


def best_split(cluster: Cluster, simulated: Simulations, start: int | None = None) -> Cluster | None:
    """With the number of training GPUs that gives most tokens per second, climbed to from `start`; None where none fits."""
    numbers, short = splits(cluster), min(cluster.steps, SEARCH_STEPS)
    if not numbers:
        return None
    at = min(range(len(numbers)), key=lambda i: abs(numbers[i] - (start or cluster.gpus / 8)))
    while True:
        around = [
            replace(cluster, training=numbers[i], steps=short) for i in range(max(0, at - 1), min(len(numbers), at + 2))
        ]
        rates = {c.training: o.tokens_per_s for c, o in zip(around, simulated(around), strict=True)}
        best = max(rates, key=lambda number: rates[number])
        if numbers[at] == best:
            return replace(cluster, training=best)
        at = numbers.index(best or 0)


# The three tables


def scaling(args: argparse.Namespace, simulated: Simulations, said: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    print(
        f"{args.model}, {args.lengths} lengths, {args.groups} × {args.group_size} responses a step, H100\n"
        "  GPUs  layout            train  tokens/s  of in turn  per GPU  step s  engines  trainer  staleness  groups/s"
    )
    for gpus in args.gpus:
        whole = Cluster(
            MODELS[args.model], gpus, None, 0, H100, LENGTHS[args.lengths], args.groups, args.group_size, args.steps
        )
        if gpus < whole.model.replica_gpus or gpus < fewest_training_gpus(whole.model, H100):
            skip(said, f"{gpus} GPUs, which are too few for {args.model}")
            continue
        (in_turn,) = simulated([whole])
        rows.append(told("in turn", whole, in_turn, in_turn))
        best: Cluster | None = None
        for age in args.max_staleness:
            best = best_split(replace(whole, max_staleness=age), simulated, best.training if best else None)
            if best is not None:
                rows.append(told(f"apart, stale {age}", best, simulated([best])[0], in_turn))
    return rows


def told(layout: str, cluster: Cluster, found: Outcome, in_turn: Outcome) -> dict[str, Any]:
    row = {
        "what": "scaling",
        "gpus": cluster.gpus,
        "layout": layout,
        "training_gpus": cluster.training,
        "max_staleness": cluster.max_staleness,
        **figures(cluster, found),
        "over_in_turn": rounded(found.tokens_per_s / in_turn.tokens_per_s),
    }
    print(
        f"  {cluster.gpus:4}  {layout:16} {cluster.training or cluster.gpus:6}  {row['tokens_per_s']:8,.0f}  "
        f"{row['over_in_turn']:10.2f}  {row['tokens_per_s_and_gpu']:7,.0f}  {row['step_s']:6.1f}  {row['engines_busy']:7.0%}  "
        f"{row['trainer_busy']:7.0%}  {row['staleness']:9.2f}  {row['groups_per_s']:8.2f}",
        flush=True,
    )
    return row


def figures(cluster: Cluster, found: Outcome) -> dict[str, float]:
    step_s = found.seconds / len(found.step_s)
    return {
        "tokens_per_s": rounded(found.tokens_per_s),
        "tokens_per_s_and_gpu": rounded(found.tokens_per_s / cluster.gpus),
        "step_s": rounded(step_s),
        "engines_busy": rounded(found.engine_busy),
        "trainer_busy": rounded(found.trainer_busy),
        "staleness": rounded(found.staleness),
        "groups_per_s": rounded(cluster.groups / step_s),
    }


def failures(args: argparse.Namespace, simulated: Simulations, best: Mapping[int, Cluster]) -> list[dict[str, Any]]:
    """On the largest cluster, long enough that some failures come."""
    gpus, cluster = max(best.items())
    print(f"\n{gpus} GPUs with failures, max_staleness {cluster.max_staleness}: tokens/s, failures, decoded again")
    rates = {"none": None, **FAILURES}
    clusters = [replace(cluster, hours_between_failures=hours, steps=args.failure_steps) for hours in rates.values()]
    rows: list[dict[str, Any]] = []
    for name, found in zip(rates, simulated(clusters), strict=True):
        rows.append(
            {
                "what": "failures",
                "gpus": gpus,
                "failures": name,
                "happened": found.failures,
                "hours": rounded(found.seconds / 3600),
                "decoded_again": rounded(found.lost_tokens / found.tokens),
                **figures(cluster, found),
            }
        )
        print(
            f"  {name:26} {found.tokens_per_s:9,.0f}  {found.failures:3} in {found.seconds / 3600:.1f} h  "
            f"{found.lost_tokens / found.tokens:.2%}",
            flush=True,
        )
    return rows


def agents(args: argparse.Namespace, simulated: Simulations, best: Mapping[int, Cluster]) -> list[dict[str, Any]]:
    """How many tools run at once where their number is not limited, and how few will do."""
    print(
        "\nAgents of 8 turns, a tool between two: environments open at once, tools at once, and workers that are enough"
    )
    rows: list[dict[str, Any]] = []
    for gpus, cluster in best.items():
        if gpus not in args.agent_gpus:
            continue
        agent = replace(cluster, is_agent=True, groups=max(1, cluster.groups // 2))
        (free,) = simulated([agent])
        tries = [math.ceil(free.tools_at_once * factor) for factor in (1.0, 1.5, 2.0, 3.0)]
        limited = [replace(agent, tool_workers=max(1, number)) for number in tries]
        kept = {
            c.tool_workers: o.tokens_per_s / free.tokens_per_s for c, o in zip(limited, simulated(limited), strict=True)
        }
        enough = next((number for number, share in kept.items() if share >= ENOUGH), free.most_tools_at_once)
        rows.append(
            {
                "what": "agents",
                "gpus": gpus,
                "environments_open": free.most_attempts,
                "tools_at_once": rounded(free.tools_at_once),
                "most_tools_at_once": free.most_tools_at_once,
                "workers_enough": enough,
                "kept_by_workers": {str(number): rounded(share) for number, share in kept.items()},
                **figures(agent, free),
            }
        )
        shares = ", ".join(f"{number}: {share:.0%}" for number, share in kept.items())
        print(
            f"  {gpus:4} GPUs: {free.most_attempts} open, {free.tools_at_once:.0f} tools in the mean, {free.most_tools_at_once} at "
            f"most; {enough} workers are enough ({shares})",
            flush=True,
        )
    return rows


def best_asynchronous(args: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> dict[int, Cluster]:
    """By number of GPUs, the best layout of the table with the lowest staleness above 0."""
    return {
        row["gpus"]: Cluster(
            MODELS[args.model],
            row["gpus"],
            row["training_gpus"],
            row["max_staleness"],
            H100,
            LENGTHS[args.lengths],
            args.groups,
            args.group_size,
            args.steps,
        )
        for row in rows
        if row["training_gpus"]
        and row["max_staleness"] == min((age for age in args.max_staleness if age), default=None)
    }


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument(
        "--calibrate", action="store_true", help="make real steps, and print predicted beside measured"
    )
    options.add_argument(
        "--cpu-time",
        action="store_true",
        help="calibrate by the seconds that are computed, on a machine that is busy; synchronous runs only",
    )
    options.add_argument("--driver", action="store_true", help="measure what one process can pass through")
    options.add_argument("--gpus", type=positive, nargs="+", default=[8, 64, 256, 1024])
    options.add_argument("--model", choices=MODELS, default="4B")
    options.add_argument("--lengths", choices=LENGTHS, default="reasoning")
    options.add_argument("--groups", type=positive, default=128, help="per step")
    options.add_argument("--group-size", type=positive, default=16, help="responses per group")
    options.add_argument("--max-staleness", type=int, nargs="+", default=[0, 1, 2, 4])
    options.add_argument("--steps", type=positive, default=12, help="that count, of each simulation or real run")
    options.add_argument(
        "--agent-gpus",
        type=positive,
        nargs="*",
        default=[8, 64],
        help="for which agents are simulated, with half of the groups",
    )
    options.add_argument("--failure-steps", type=positive, default=40, help="of the simulations with failures")
    options.add_argument("--only-scaling", action="store_true", help="neither failures nor agents")
    options.add_argument("--jobs", type=positive, default=len(os.sched_getaffinity(0)), help="simulations at a time")
    options.add_argument(
        "--tokens", type=positive, nargs="+", default=driver.TOKENS, help="per response, with --driver"
    )
    args = options.parse_args(argv)
    with reported("simulate", args, argv) as said:
        if args.calibrate:
            said["results"].append(calibration.calibrate(args))
        if args.driver:
            said["results"] += driver.measure(args)
        if args.calibrate or args.driver:
            return
        with simulations(args.jobs) as simulated:
            said["results"] += scaling(args, simulated, said)
            best = best_asynchronous(args, said["results"])
            if best and not args.only_scaling:
                said["results"] += failures(args, simulated, best)
                said["results"] += agents(args, simulated, best)


if __name__ == "__main__":
    main()
