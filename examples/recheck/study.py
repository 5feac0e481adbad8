"""Algorithms beside each other on the recheck task: how many steps each needs to a reward of 0.8, and what it clips.

For each rarity of the recheck token and number of updates per batch a learning rate is tuned for each algorithm, by the
same budget and on seeds of its own; then the seeds of the study are run. What is there already is not run again, so the
study can be cut off and go on. All runs start from one base model for each rarity of the recheck token. Dynamic
sampling is off, so that every algorithm sees as many samples per batch. `study_report.py` makes tables and plots of it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent))
from demo import ROOT, base_model, metrics_of

ALGORITHMS = {
    "cispo": [],
    "cispo_sequence": ["algorithm.ratio=sequence"],
    "dapo": ["algorithm.name=dapo", "algorithm.dynamic_sampling=false"],
    "grpo": ["algorithm.name=grpo"],
    "gspo": ["algorithm.name=gspo"],
}
CELLS = {
    (0.03, 16): ((2.5e-5, 5e-5, 1e-4, 2e-4), 40),
    (0.03, 4): ((1e-4, 2e-4, 4e-4, 8e-4), 40),
    (0.03, 1): ((2.5e-4, 5e-4, 1e-3), 40),
    (0.005, 16): ((2.5e-5, 5e-5), 45),
}
"""Share of demonstrations that recheck and updates per batch → the learning rates that are tried, and the most steps."""
TUNING_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)
THRESHOLD = 0.8
FOLDER = ROOT / "runs" / "recheck-study"


@dataclass(frozen=True)
class Setting:
    rarity: float
    updates: int
    algorithm: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.algorithm}-u{self.updates}-r{self.rarity:g}-lr{self.learning_rate:g}-s{self.seed}"

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def most_steps(self) -> int:
        return CELLS[self.rarity, self.updates][1]

    @property
    def is_done(self) -> bool:
        """It ran to its end, or diverged, as it would again."""
        events = self.folder / "events.jsonl"
        diverged = events.exists() and "NonFiniteError" in events.read_text()
        return diverged or any(self.folder.glob("checkpoints/step-*"))

    def steps_to_threshold(self) -> int:
        """The first step with a reward of 0.8, counted from 1; one more than were made when none has it."""
        steps = metrics_of(self.folder) if (self.folder / "metrics.jsonl").exists() else []
        rewards = [step["rollout/reward"] for step in steps]
        return next((i for i, reward in enumerate(rewards, 1) if reward >= THRESHOLD), self.most_steps + 1)


def run(setting: Setting) -> str:
    """One training, through the command that everybody uses, in this process: torch is loaded once."""
    from sluice.cli import main

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        model, task = base_model(setting.rarity, seed=0)
    words = [
        f"model.path={model}",
        f"data.path={task}/questions.jsonl",
        f"run.folder={FOLDER}",
        f"run.name={setting.name}",
        f"run.seed={setting.seed}",
        f"run.num_steps={setting.most_steps}",
        f"run.stop_at_reward={THRESHOLD}",
        "run.num_threads=1",
        f"trainer.updates_per_batch={setting.updates}",
        f"trainer.learning_rate={setting.learning_rate}",
    ]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        code = main(["train", str(ROOT / "recipes/recheck.yaml"), *words, *ALGORITHMS[setting.algorithm]])
    return f"{setting.name}: {setting.steps_to_threshold()}" + (f" (ended with code {code})" if code else "")


def run_all(settings: list[Setting], processes: int) -> None:
    todo = [s for s in settings if not s.is_done]
    if unfinished := [s.folder for s in todo if s.folder.exists()]:
        raise SystemExit(f"{unfinished[0]} is there but unfinished; remove it, and this makes it again")
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for i, line in enumerate(pool.imap_unordered(run, todo, chunksize=1), 1):
            print(f"{i}/{len(todo)} {line}", flush=True)


def tuning(rarity: float, updates: int, algorithm: str) -> list[Setting]:
    rates, _ = CELLS[rarity, updates]
    return [Setting(rarity, updates, algorithm, rate, seed) for rate in rates for seed in TUNING_SEEDS]


def tuned_rate(rarity: float, updates: int, algorithm: str) -> float:
    """The one with the fewest steps on the tuning seeds; of equals, the smaller."""
    by_rate: dict[float, list[int]] = {}
    for setting in tuning(rarity, updates, algorithm):
        by_rate.setdefault(setting.learning_rate, []).append(setting.steps_to_threshold())
    return min(by_rate, key=lambda rate: (mean(by_rate[rate]), rate))


def measured(rarity: float, updates: int, algorithm: str) -> list[Setting]:
    rate = tuned_rate(rarity, updates, algorithm)
    return [Setting(rarity, updates, algorithm, rate, seed) for seed in SEEDS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="trainings at once, each of one thread")
    args = parser.parse_args()
    os.environ["GOMP_SPINCOUNT"] = "1000"
    for rarity in sorted({rarity for rarity, _ in CELLS}):
        base_model(rarity, seed=0)
    for cell in CELLS:
        run_all([s for a in ALGORITHMS for s in tuning(*cell, a)], args.processes)
        print(f"{cell}, learning rates: {json.dumps({a: tuned_rate(*cell, a) for a in ALGORITHMS})}", flush=True)
        run_all([s for a in ALGORITHMS for s in measured(*cell, a)], args.processes)


if __name__ == "__main__":
    main()
