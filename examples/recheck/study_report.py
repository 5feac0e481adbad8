"""Tables (markdown, on stdout) and plots (SVG, in a folder) of what study.py has run so far. Nothing is trained.

A run that ends without a reward of 0.8 has no number of steps. An algorithm with such a run gets no mean and no ratio, but the
median and how many runs got there. Runs of one seed draw the same prompts, so a ratio to DAPO is of pairs: mean over mean,
with a bootstrap over the seeds (all resamples) and, as that is too narrow for five seeds, Fieller's interval from Student's t.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import covariance, mean, median, quantiles, stdev, variance

import matplotlib
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sluice.analysis.clipped_tokens import Clipping, Pool, analyse

sys.path.insert(0, str(Path(__file__).parent))
import study
from demo import metrics_of
from study import ALGORITHMS, CELLS, SEEDS, THRESHOLD, Setting, measured, tuned_rate, tuning
from task import RECHECK

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""The 97.5 % quantile of Student's t by degrees of freedom."""
BASELINE = "dapo"
MIN_COUNT = 10
"""Tokens that occur less often are not listed among the most clipped."""
STYLE = {
    "font.size": 8,
    "font.sans-serif": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "sluice",
}
NOTHING = Clipping(0, 0, 0.0, None, None)

Cell = tuple[float, int]
Runs = dict[str, list[Setting]]
"""The measured runs of a cell that are done, by algorithm; without those algorithms that have none."""
Interval = tuple[float, float]


# Which runs there are


def is_tuned(cell: Cell, algorithm: str) -> bool:
    return all(s.is_done for s in tuning(*cell, algorithm))


def done(cell: Cell) -> Runs:
    runs = {a: [s for s in measured(*cell, a) if s.is_done] for a in ALGORITHMS if is_tuned(cell, a)}
    return {algorithm: settings for algorithm, settings in runs.items() if settings}


def missing(cell: Cell) -> str:
    """What the study still owes this cell; empty when it is whole."""
    tunings = sum(not s.is_done for a in ALGORITHMS for s in tuning(*cell, a))
    measurements = len(ALGORITHMS) * len(SEEDS) - sum(map(len, done(cell).values()))
    return f"Missing: {tunings} tuning runs, {measurements} measured runs.\n" if tunings or measurements else ""


def title(cell: Cell) -> str:
    return f"{100 * cell[0]:g} % recheck, {cell[1]} update{'s' * (cell[1] > 1)} per batch"


# Steps to the threshold


def t_interval(values: Sequence[float]) -> Interval | None:
    if len(values) < 2:
        return None
    half = T_975[len(values) - 1] * stdev(values) / sqrt(len(values))
    return mean(values) - half, mean(values) + half


def bootstrap(a: Sequence[float], b: Sequence[float]) -> Interval:
    """95 % percentile interval of mean(a) / mean(b), from all resamples of the pairs."""
    draws = product(zip(a, b, strict=True), repeat=len(a))
    cuts = quantiles((sum(x for x, _ in draw) / sum(y for _, y in draw) for draw in draws), n=40, method="inclusive")
    return cuts[0], cuts[-1]


def fieller(a: Sequence[float], b: Sequence[float]) -> Interval | None:
    """The q for which a t-test at 5 % does not reject that a - q·b is 0 in the mean; None where they are not bounded."""
    t = T_975[len(a) - 1] ** 2 / len(a)
    aa, ab, bb = (
        mean(a) ** 2 - t * variance(a),
        mean(a) * mean(b) - t * covariance(a, b),
        mean(b) ** 2 - t * variance(b),
    )
    root = sqrt(max(0.0, ab**2 - aa * bb))
    return ((ab - root) / bb, (ab + root) / bb) if bb > 0 else None


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def span(interval: Interval | None, digits: int) -> str:
    return "–" if interval is None else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def steps_of(settings: Sequence[Setting]) -> list[int] | None:
    """None when one of them has not reached the threshold."""
    steps = [s.steps_to_threshold() for s in settings]
    return steps if all(n <= s.most_steps for n, s in zip(steps, settings)) else None


def said(setting: Setting) -> str:
    """Steps of one run; where it did not get there, that, and the mean reward of its last ten batches."""
    if not setting.is_done:
        return "–"
    if steps := steps_of([setting]):
        return str(steps[0])
    return f"> {setting.most_steps} ({mean(m['rollout/reward'] for m in metrics_of(setting.folder)[-10:]):.2f})"


def average(settings: Sequence[Setting]) -> str:
    if steps := steps_of(settings):
        return f"{mean(steps):.1f} ({span(t_interval(steps), 1)})"
    steps, most = [s.steps_to_threshold() for s in settings], settings[0].most_steps
    middle = f"{median(steps):g}" if median(steps) <= most else f"> {most}"
    return f"median {middle}; {sum(n <= most for n in steps)} of {len(steps)} within {most}"


def ratio(runs: Runs, algorithm: str, to: str) -> str:
    ours, theirs = ({s.seed: s for s in runs.get(name, [])} for name in (algorithm, to))
    seeds = sorted(ours.keys() & theirs.keys())
    a, b = (steps_of([of[seed] for seed in seeds]) for of in (ours, theirs))
    if algorithm == to or not a or not b or len(seeds) < 2:
        return "–"
    return f"{mean(a) / mean(b):.2f} ({span(bootstrap(a, b), 2)}; {span(fieller(a, b), 2)})"


# Tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def tuning_table(cell: Cell) -> str:
    rates, _ = CELLS[cell]
    rows, at_the_edge = [], []
    for algorithm in ALGORITHMS:
        chosen = tuned_rate(*cell, algorithm) if is_tuned(cell, algorithm) else None
        steps = [", ".join(said(s) for s in tuning(*cell, algorithm) if s.learning_rate == rate) for rate in rates]
        if chosen in (rates[0], rates[-1]):
            at_the_edge.append(algorithm)
        rows.append([algorithm, *(f"**{s}**" if rate == chosen else s for rate, s in zip(rates, steps))])
    text = table(["tuning: steps of two seeds at learning rate", *(f"{rate:g}" for rate in rates)], rows)
    return text + (f"\nThe smallest or largest rate is the best of: {', '.join(at_the_edge)}.\n" if at_the_edge else "")


def steps_table(cell: Cell, runs: Runs) -> str:
    to = BASELINE
    rows = [
        [a, f"{rs[0].learning_rate:g}", ", ".join(map(said, rs)), average(rs), ratio(runs, a, to), *inside(rs)]
        for a, rs in runs.items()
    ]
    head = ["", "learning rate", "steps to 0.8 of each seed", "mean (95 %, t)", f"ratio to {to} (bootstrap; Fieller)"]
    return table([*head, "clip fraction", "entropy, first → last step", "largest ratio"], rows)


def inside(runs: Sequence[Setting]) -> Iterator[str]:
    """Clip fraction (mean of all steps), entropy (mean of the runs) and the largest ratio."""
    steps = [metrics_of(s.folder) for s in runs]
    yield percent(mean(step["train/pg_clipfrac"] for run in steps for step in run))
    yield " → ".join(f"{mean(run[i]['train/entropy'] for run in steps):.2f}" for i in (0, -1))
    yield f"{max(step['train/ratio/max'] for run in steps for step in run):.3g}"


def pools(runs: Runs, last_step: int) -> dict[str, Pool]:
    """What `sluice analyze clipped-tokens --steps 1:LAST` counts."""
    return {a: analyse([s.folder for s in rs], (1, last_step))[0] for a, rs in runs.items()}


def shares(everything: Clipping, recheck: Clipping) -> tuple[float, float]:
    """The clipped share of the recheck token, and of the other tokens."""
    others = everything.occurrences - recheck.occurrences
    return recheck.share, (everything.clipped - recheck.clipped) / others if others else 0.0


def total_and_by_update(pool: Pool) -> tuple[tuple[float, float], dict[int, tuple[float, float]]]:
    """The shares in all, and of each update. A pool does not list a token that was never clipped: its share is 0."""
    recheck = next((token for token in pool.tokens if token.token == RECHECK), None)
    updates = recheck.by_update if recheck else {}
    by_update = {update: shares(total, updates.get(update, NOTHING)) for update, total in pool.by_update.items()}
    return shares(pool.total, recheck.total if recheck else NOTHING), by_update


def with_positive_advantage(runs: Sequence[Setting], last_step: int) -> tuple[float, float]:
    """The shares among the tokens that the reward would have more of."""
    files = [file for s in runs for file in sorted((s.folder / "ledger").glob("step-*"))[:last_step]]
    names = ["tokens", "loss_weights", "advantages", "clipped"]
    rows = pa.concat_tables([pq.read_table(file, columns=["trained", *names]) for file in files])
    rows = rows.filter(rows["trained"])
    flat = (rows[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in names)
    tokens, weights, advantages, clipped = flat
    is_recheck, chosen = tokens == RECHECK, (weights != 0) & (advantages > 0)
    recheck, others = clipped[chosen & is_recheck], clipped[chosen & ~is_recheck]
    return float(recheck.mean()) if recheck.size else 0.0, float(others.mean()) if others.size else 0.0


def clipped_table(runs: Runs, clipped: dict[str, Pool], last_step: int) -> str:
    rows = []
    for algorithm, pool in clipped.items():
        (recheck, others), _ = total_and_by_update(pool)
        upwards = map(percent, with_positive_advantage(runs[algorithm], last_step))
        frequent = [token for token in pool.tokens if token.total.occurrences >= MIN_COUNT]
        most = ", ".join(f"`{token.token}` {percent(token.total.share)}" for token in frequent[:4])
        rows.append([algorithm, percent(recheck), percent(others), *upwards, most or "none"])
    head = ["recheck tokens", "others", "recheck tokens, A > 0", "others, A > 0", "clipped most"]
    return table([f"clipped, first {last_step} steps", *head], rows)


def agreement(runs: Sequence[Setting]) -> str:
    steps = [step for s in runs for step in metrics_of(s.folder)]
    difference = max(step["train/engine_logprob_diff/max"] for step in steps)
    log_ratio = max(abs(step["train/first_update/ppo_kl"]) for step in steps)
    return (
        f"First updates of {len(steps):,} steps in {len(runs)} runs, engine against trainer: "
        f"a token's log-prob differs by {difference:.1e} at most, the mean log-ratio by {log_ratio:.1e}."
    )


# Plots


def panels(cells: Sequence[Cell]) -> tuple[Figure, list[list[Axes]]]:
    """A row for each cell, a column for each algorithm of the first."""
    algorithms = list(ALGORITHMS)
    figure = Figure(figsize=(2 * len(algorithms), 2 * len(cells)), layout="constrained")
    grid = figure.subplots(len(cells), len(algorithms), squeeze=False, sharex="row", sharey="row").tolist()
    for algorithm, panel in zip(algorithms, grid[0]):
        panel.set_title(algorithm)
    for cell, row in zip(cells, grid):
        row[0].set_ylabel(title(cell).replace(", ", "\n"))
        row[0].xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        row[0].yaxis.set_major_locator(MaxNLocator(nbins=2))
    return figure, grid


def draw_rewards(cell: Cell, runs: Runs) -> Figure:
    """Each seed, and the mean as far as all seeds run; behind it, that of the reference."""
    figure, (row,) = panels([cell])
    curves = {a: [[m["rollout/reward"] for m in metrics_of(s.folder)] for s in rs] for a, rs in runs.items()}
    means = {a: [mean(batch) for batch in zip(*of_seeds)] for a, of_seeds in curves.items()}
    for algorithm, panel in zip(ALGORITHMS, row):
        i = list(ALGORITHMS).index(algorithm)
        for curve in curves.get(algorithm, []):
            panel.plot(range(1, len(curve) + 1), curve, color=f"C{i}", alpha=0.4, linewidth=0.8)
        for name, style in ((BASELINE, "k--"), (algorithm, f"C{i}-")):
            panel.plot(range(1, len(means.get(name, [])) + 1), means.get(name, []), style, linewidth=1.5)
        panel.axhline(THRESHOLD, color="grey", linestyle=":", linewidth=0.8)
        panel.set_ylim(0, 1)
    figure.supxlabel(f"step (dashed: the mean of {BASELINE})")
    return figure


def draw_steps(found: dict[Cell, Runs]) -> Figure:
    """Each seed, and where all of them got there the mean with its t-interval; a line at half of DAPO's."""
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    for (cell, runs), panel in zip(found.items(), figure.subplots(1, len(found), squeeze=False, sharey=True)[0]):
        for i, algorithm in enumerate(ALGORITHMS):
            settings = runs.get(algorithm, [])
            panel.plot([s.steps_to_threshold() for s in settings], [i] * len(settings), f"C{i}o", alpha=0.4)
            if (steps := steps_of(settings)) and (interval := t_interval(steps)):
                panel.plot([interval[0], mean(steps), interval[1]], [i + 0.3] * 3, f"C{i}|-")
                if algorithm == BASELINE:
                    panel.axvline(mean(steps) / 2, color="grey", linestyle="--", linewidth=0.8)
        panel.set_yticks(range(len(ALGORITHMS)), list(ALGORITHMS))
        panel.set(title=title(cell).replace(", ", "\n"), xlim=(0, None), ylim=(len(ALGORITHMS) - 0.4, -0.4))
    figure.supxlabel(
        "steps to 0.8: seeds, and the mean with 95 % interval (dashed: half of dapo's, where it was not run half of cispo's)"
    )
    return figure


def draw_clipped(clipped: dict[Cell, dict[str, Pool]], last_step: int) -> Figure:
    figure, grid = panels(list(clipped))
    for of_cell, row in zip(clipped.values(), grid):
        for algorithm, panel in zip(ALGORITHMS, row):
            by_update = total_and_by_update(of_cell[algorithm])[1] if algorithm in of_cell else {}
            for i, label in enumerate(("recheck token", "others")):
                panel.plot(list(by_update), [pair[i] for pair in by_update.values()], f"C{3 - 3 * i}-", label=label)
            panel.yaxis.set_major_formatter(PercentFormatter(1))
    grid[0][0].legend(frameon=False)
    figure.supxlabel(f"update of the step, from 0; share of tokens that are clipped, first {last_step} steps")
    return figure


def save_plots(folder: Path, found: dict[Cell, Runs], clipped: dict[Cell, dict[str, Pool]], last_step: int) -> None:
    """The same figures give the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    several = {cell: pools for cell, pools in clipped.items() if cell[1] > 1}  # one update clips nothing
    with matplotlib.rc_context(STYLE):
        figures = {f"rewards_{100 * cell[0]:g}_{cell[1]}": draw_rewards(cell, runs) for cell, runs in found.items()}
        figures["steps"] = draw_steps(found)
        if several:
            figures["clipped"] = draw_clipped(several, last_step)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plots", type=Path, help="folder for the plots")
    parser.add_argument("--runs", type=Path, default=study.FOLDER, help="folder of the study's runs")
    parser.add_argument("--first-steps", type=int, default=5, help="steps whose clipped tokens are counted")
    args = parser.parse_args()
    study.FOLDER, last = args.runs, args.first_steps
    found = {cell: runs for cell in CELLS if (runs := done(cell))}
    clipped = {cell: pools(runs, last) for cell, runs in found.items()}
    for cell in CELLS:
        print(f"## {title(cell)}\n")
        if owed := missing(cell):
            print(owed)
        if any(s.is_done for a in ALGORITHMS for s in tuning(*cell, a)):
            print(tuning_table(cell))
        if cell in found:
            print(steps_table(cell, found[cell]), clipped_table(found[cell], clipped[cell], last), sep="\n")
    tunings = [s for cell in CELLS for a in ALGORITHMS for s in tuning(*cell, a) if s.is_done]
    if not tunings:
        raise SystemExit(
            f"{args.runs} has no finished run of the study: make some with study.py, or give another --runs"
        )
    print(agreement([*tunings, *(s for runs in found.values() for rs in runs.values() for s in rs)]))
    if found:
        save_plots(args.plots, found, clipped, last)


if __name__ == "__main__":
    main()
