"""The simulation against real steps on this machine: constants from some runs of `sluice train`, and other runs predicted with them.

The runs that are predicted have other group sizes, lengths and slots than those whose times the constants are from. All have a model of a
million parameters with random weights, one thread for the engine and one for the trainer, and responses whose lengths depend on the
seed of the request alone: run and simulation sample the same ones.

With `--cpu-time` all is measured in the seconds that the loop's thread computes, and not in those that pass: so a machine that is busy
with other things does for the synchronous runs with the engine in the trainer's process, in which nothing computes beside that thread.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any

import numpy as np

import sluice.run
from distributions import LogNormal
from measuring import rounded, spread
from shapes import save
from simulated_engine import EngineRates, EngineSetting
from simulated_run import Setting, simulate
from simulated_trainer import TrainerRates
from sluice.config import TrainConfig
from sluice.configfile import load
from sluice.launch import train
from sluice.tracking.tracker import FileTracker
from sluice.types import Completion, Sampling
from step import write_prompts
from step_sluice import ENGINES

SIZE = "1M"
PROMPT_TOKENS = 8
LEAST_STEP_S = 1e-6
WARM_UP = 3
"""Steps of a run that do not count: the first ones pay for what is done once, and with staleness the pipeline fills."""


@dataclass(frozen=True)
class Case:
    """What is varied."""

    groups: int
    group_size: int
    lengths: LogNormal
    slots: int
    process: str = "trainer"
    """`engine.process`"""
    max_staleness: int = 0

    def __str__(self) -> str:
        lengths, age = self.lengths, f", max_staleness {self.max_staleness}" if self.max_staleness else ""
        return (
            f"{self.groups} × {self.group_size} responses of median {lengths.median:g} and 99th percentile {lengths.p99:g} "
            f"({lengths.longest:g} at most), {self.slots} slots, engine.process={self.process}{age}"
        )


SHORT, LONG, SKEWED = LogNormal(20, 60, 64), LogNormal(60, 200, 192), LogNormal(40, 400, 256)
FITTED = [
    Case(8, 8, SHORT, 256),
    Case(16, 8, SHORT, 32),
    Case(8, 16, LONG, 256),
    Case(6, 8, LONG, 16),
    Case(24, 8, SHORT, 256),
]
"""Constants are from these, with the engine in the trainer's process and, anew, in one of its own."""
PREDICTED = [Case(12, 6, SKEWED, 48), Case(5, 20, SKEWED, 256)]
ASYNCHRONOUS = 1
"""The staleness of the asynchronous runs."""


@dataclass(frozen=True)
class Constants:
    engine: EngineRates
    trainer: TrainerRates
    publication_s: float
    record_s: float
    record_token_s: float

    def slower(self, factor: float) -> Constants:
        """As when engine and trainer compute at the same time and share the memory."""
        engine, trainer = vars(self.engine), vars(self.trainer) | {"ranks": 1 / factor}
        return replace(
            self,
            engine=EngineRates(**{name: factor * value for name, value in engine.items()}),
            trainer=TrainerRates(**{**trainer, "update_s": factor * self.trainer.update_s}),
        )

    def setting(self, case: Case, steps: int) -> Setting:
        tokens = case.groups * case.group_size * case.lengths.mean()
        return Setting(
            engine=EngineSetting(1, case.slots, self.engine, self.publication_s),
            trainer=self.trainer,
            lengths=case.lengths,
            groups_per_step=case.groups,
            group_size=case.group_size,
            max_staleness=case.max_staleness,
            num_steps=steps + WARM_UP,
            prompt_tokens=PROMPT_TOKENS,
            record_s=self.record_s + tokens * self.record_token_s,
            micro_batches=max(1, math.ceil(tokens / 16384)),
        )


NOTHING = Constants(EngineRates(1.0, 0.0), TrainerRates(0.0), 0.0, 0.0, 0.0)
"""A decode step takes a second, and all else no time."""


# Real runs


@contextmanager
def watched(case: Case, ends: list[float], clock: Callable[[], float]) -> Generator[None]:
    """Lengths are forced, the ends of steps noted, and phases timed by the clock; what is changed for that is put back."""
    log, generates = FileTracker.log, [engine.generate for engine in ENGINES]

    def forced(generate: Any) -> Any:
        async def generated(self: Any, prompt_ids: Any, sampling: Sampling) -> Completion:
            changes = {"max_new_tokens": case.lengths.length(sampling), "stop_token_ids": frozenset()}
            return await generate(self, prompt_ids, replace(sampling, **changes))

        return generated

    def noted(self: FileTracker, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        ends.append(clock())

    try:
        sluice.run.time = SimpleNamespace(perf_counter=clock)  # type: ignore[assignment]
        FileTracker.log = noted  # type: ignore[method-assign]
        for engine, generate in zip(ENGINES, generates, strict=True):
            engine.generate = forced(generate)  # type: ignore[method-assign]
        yield
    finally:
        sluice.run.time = time
        FileTracker.log = log  # type: ignore[method-assign]
        for engine, generate in zip(ENGINES, generates, strict=True):
            engine.generate = generate  # type: ignore[method-assign]


def measured(folder: Path, case: Case, steps: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Mean seconds of a step of a real run, in all (`step`) and by phase."""
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as runs, watched(case, ends, clock), redirect_stdout(StringIO()):
        words = [
            f"model.path={folder / 'model'}",
            "model.random_weights=true",
            f"data.path={folder / 'prompts.jsonl'}",
            f"engine.process={case.process}",
            *(["engine.num_threads=1"] if case.process == "own" else []),
            f"engine.num_slots={case.slots}",
            f"rollout.groups_per_step={case.groups}",
            f"rollout.group_size={case.group_size}",
            f"rollout.max_new_tokens={case.lengths.longest:g}",
            f"rollout.max_staleness={case.max_staleness}",
            "rewards=[{name: digits:share_of_digits}]",
            f"run.folder={runs}",
            "run.name=measured",
            f"run.num_steps={WARM_UP + steps}",
            "run.num_threads=1",
            "checkpoint.every_steps=null",
            "watchdog.warn_after_s=null",
            *(f"checks.{name}=off" for name in ("entropy", "response_length", "repetition", "equal_rewards")),
        ]
        run = train(load(TrainConfig, [], words), "measured")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    names = ("rollout", "train", "publish", "record", "checks")
    found = {name: fmean(line.get(f"perf/{name}_s", 0.0) for line in lines) for name in names}
    return found | {"step": (ends[-1] - ends[WARM_UP - 1]) / steps}


# Constants


def work_of(case: Case, steps: int) -> list[float]:
    """Of the mean step: decode steps, tokens, tokens in the cache at each decode step, and requests."""
    num_steps = mean_step_s(NOTHING.setting(case, steps))
    cached = replace(NOTHING, engine=EngineRates(0.0, 0.0, cached_token_s=1.0))
    sequences = replace(NOTHING, engine=EngineRates(0.0, 1.0))
    num_tokens, num_cached = (mean_step_s(c.setting(case, steps)) for c in (sequences, cached))
    return [num_steps, num_tokens, num_cached, case.groups * case.group_size]


def mean_step_s(setting: Setting) -> float:
    return fmean(simulate(setting, WARM_UP).step_s)


def least_squares(rows: list[list[float]], values: list[float]) -> list[float]:
    """Of the relative errors. No constant is below 0: the one that would be lowest is left out, and the others are found anew."""
    matrix = np.array(rows) / np.array(values)[:, None]
    used = list(range(len(rows[0])))
    while True:
        scale = np.abs(matrix[:, used]).max(axis=0)
        found = np.linalg.lstsq(matrix[:, used] / scale, np.ones(len(values)), rcond=None)[0] / scale
        if (found >= 0).all():
            break
        del used[int(np.argmin(found * scale))]
    constants = [0.0] * len(rows[0])
    for i, value in zip(used, found, strict=True):
        constants[i] = float(value)
    return constants


def fit(cases: list[Case], times: list[dict[str, float]], steps: int) -> Constants:
    """From synchronous runs, in which nothing overlaps but the writing of the ledger with the next rollout."""
    work = [work_of(case, steps) for case in cases]
    step_s, sequence_s, cached_token_s, request_s = least_squares(work, [t["rollout"] + t["record"] for t in times])
    trained = [[1.0, tokens, requests] for _, tokens, _, requests in work]
    update_s, token_s, sample_s = least_squares(trained, [t["train"] + t["checks"] for t in times])
    record_s, record_token_s = least_squares([[1.0, tokens] for _, tokens, *_ in work], [t["record"] for t in times])
    return Constants(
        EngineRates(max(step_s, LEAST_STEP_S), sequence_s, cached_token_s, request_s=request_s),
        TrainerRates(token_s, update_s=update_s, sample_s=sample_s),
        publication_s=median(t["publish"] for t in times),
        record_s=record_s,
        record_token_s=record_token_s,
    )


def predicted(constants: Constants, case: Case, steps: int) -> float:
    return mean_step_s(constants.setting(case, steps))


def slowdown(constants: Constants, cases: list[Case], step_s: list[float], steps: int) -> float:
    """By how much engine and trainer slow each other down where their steps overlap, by halving: at least not at all."""
    low, high = 1.0, 3.0
    for _ in range(12):
        middle = (low + high) / 2
        ratios = [predicted(constants.slower(middle), case, steps) / s for case, s in zip(cases, step_s, strict=True)]
        low, high = (middle, high) if fmean(ratios) < 1 else (low, middle)
    return low


def calibrate(args: argparse.Namespace) -> dict[str, Any]:
    """All runs in turn, in several rounds; of each run its fastest round counts, in which others have disturbed it least."""
    processes = ["trainer"] if args.cpu_time else ["trainer", "own"]
    fitted = {process: [replace(case, process=process) for case in FITTED] for process in processes}
    asked = {process: [replace(case, process=process) for case in PREDICTED] for process in processes}
    overlapping = [replace(case, max_staleness=ASYNCHRONOUS) for case in fitted.get("own", [])[:3:2]]
    stale = [replace(case, max_staleness=ASYNCHRONOUS) for case in asked.get("own", [])]
    cases = [case for process in processes for case in fitted[process] + asked[process]]
    cases += overlapping + stale
    times = best_of(cases, args)
    results: list[dict[str, Any]] = []
    for process in processes:
        constants = fit(fitted[process], [times[case][0] for case in fitted[process]], args.steps)
        results += [compared(case, times[case], constants, args.steps) for case in asked[process]]
        if process == "own":
            step_s = [times[case][0]["step"] for case in overlapping]
            factor = slowdown(constants, overlapping, step_s, args.steps)
            print(f"engine and trainer slow each other down by {factor:.3f}")
            results += [compared(case, times[case], constants.slower(factor), args.steps) for case in stale]
    return {"what": "calibration", "cpu_time": args.cpu_time, "predicted": results}


def best_of(cases: Sequence[Case], args: argparse.Namespace) -> dict[Case, list[dict[str, float]]]:
    """The rounds of every run, the fastest first."""
    clock = time.thread_time if args.cpu_time else time.perf_counter
    times: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder / "model", SIZE, weights=False)
        write_prompts(folder / "prompts.jsonl")
        for _ in range(args.rounds):
            for case in cases:
                times[case].append(measured(folder, case, args.steps, clock))
                print(f"  {times[case][-1]['step']:.3f} s a step: {case}", flush=True)
    return {case: sorted(found, key=lambda one: one["step"]) for case, found in times.items()}


def compared(case: Case, times: list[dict[str, float]], constants: Constants, steps: int) -> dict[str, Any]:
    step_s = predicted(constants, case, steps)
    ratio = step_s / times[0]["step"]
    print(f"predicted {step_s:.3f} s, measured {times[0]['step']:.3f} s, ratio {ratio:.3f}: {case}", flush=True)
    return {
        "case": str(case),
        "predicted_s": rounded(step_s),
        "measured_s": spread([one["step"] for one in times]),
        "predicted_over_fastest": rounded(ratio),
        "phases_s": {name: rounded(value) for name, value in times[0].items()},
        "constants": {
            "engine": {name: rounded(value) for name, value in vars(constants.engine).items()},
            "trainer": {name: rounded(value) for name, value in vars(constants.trainer).items()},
            "publication_s": rounded(constants.publication_s),
            "record_s": rounded(constants.record_s),
            "record_token_s": rounded(constants.record_token_s),
        },
    }
