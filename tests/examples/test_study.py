"""The study tunes and resumes as it says, and its report says of fabricated runs what is known of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from math import sqrt
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples/recheck"))

import study  # noqa: E402
import study_report  # noqa: E402
from study import SEEDS, Setting, tuned_rate, tuning  # noqa: E402
from task import RECHECK  # noqa: E402

CELL = (0.03, 16)
RATES, MOST = study.CELLS[CELL]


def make_run(setting: Setting, steps: int, is_finished: bool = True) -> None:
    """A run that gets to the threshold at its last step, or ends below it after as many as the study makes."""
    made, reached = min(steps, setting.most_steps), steps <= setting.most_steps
    rewards = [*[0.25] * (made - 1), 0.9 if reached else 0.25]
    other = {"train/pg_clipfrac": 0.125, "train/entropy": 0.5, "train/ratio/max": 3.0}
    other |= {"train/engine_logprob_diff/max": 2e-6, "train/first_update/ppo_kl": -1e-7}
    setting.folder.mkdir(parents=True)
    (setting.folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"rollout/reward": r, **other}) + "\n" for r in rewards)
    )
    if is_finished:
        (setting.folder / f"checkpoints/step-{made:06d}").mkdir(parents=True)


def add_ledger(setting: Setting, clipped: Sequence[bool]) -> None:
    """One step of a sample `<recheck>12` for each of `clipped`, which says whether its first token is; the last two have A < 0."""
    (setting.folder / "config.yaml").write_text(f"algorithm: {{name: {setting.algorithm}}}\n")
    (setting.folder / "ledger").mkdir()
    signs = [1.0] * (len(clipped) - 2) + [-1.0] * 2
    rows = [
        {
            "trained": True,
            "update": int(first),
            "token_ids": [16, 3, 4],
            "tokens": [RECHECK, "1", "2"],
            "loss_weights": [1.0, 1.0, 1.0],
            "advantages": [sign] * 3,
            "ratios": [2.0 if first else 1.0, 1.0, 1.0],
            "clipped": [first, False, False],
        }
        for first, sign in zip(clipped, signs, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), setting.folder / "ledger/step-000001.parquet")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(study, "FOLDER", tmp_path / "study")
    return tmp_path / "study"


def tune(algorithm: str, steps: dict[float, tuple[int, int]]) -> None:
    for setting in tuning(*CELL, algorithm):
        make_run(setting, steps[setting.learning_rate][setting.seed - study.TUNING_SEEDS[0]])


# The study


@pytest.mark.parametrize(
    ("steps", "best"),
    [
        ([(30, 30), (12, 14), (9, 8), (20, 21)], 2),
        ([(30, 30), (10, 10), (5, 15), (20, 20)], 1),  # of equals the smaller
        ([(30, 30), (20, 21), (6, MOST + 1), (41, 41)], 1),  # one that does not get there counts as a step more
    ],
)
def test_the_rate_with_the_fewest_steps_is_taken(steps: list[tuple[int, int]], best: int) -> None:
    tune("dapo", dict(zip(RATES, steps, strict=True)))
    assert tuned_rate(*CELL, "dapo") == RATES[best]


def test_steps_are_counted_from_1(folder: Path) -> None:
    reached, not_reached = Setting(*CELL, "dapo", 1e-4, 0), Setting(*CELL, "dapo", 1e-4, 1)
    make_run(reached, 3)
    make_run(not_reached, MOST + 1)
    assert reached.steps_to_threshold() == 3
    assert not_reached.steps_to_threshold() == MOST + 1


def test_what_is_done_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(study, "run", lambda setting: started.append(setting) or setting.name)
    monkeypatch.setattr(study.multiprocessing, "get_context", lambda kind: SimpleNamespace(Pool=ThreadPool))
    settings = tuning(*CELL, "dapo")
    for setting in settings[:3]:
        make_run(setting, 5)
    study.run_all(settings, processes=1)
    assert started == settings[3:]


def test_an_unfinished_run_is_not_overwritten() -> None:
    settings = tuning(*CELL, "dapo")
    make_run(settings[1], 5, is_finished=False)
    with pytest.raises(SystemExit, match=f"{settings[1].name} is there but unfinished"):
        study.run_all(settings, processes=1)


# Intervals


def test_intervals() -> None:
    assert study_report.t_interval([1, 2, 3, 4, 5]) == pytest.approx((1.037, 4.963), abs=1e-3)
    twice, half = [6, 8, 11, 7], [3, 4, 5.5, 3.5]
    assert study_report.bootstrap(twice, half) == pytest.approx((2, 2))
    assert study_report.fieller(twice, half) == pytest.approx((2, 2))
    assert study_report.bootstrap([6, 10], [4, 4]) == pytest.approx((1.5375, 2.4625))  # of 1.5, 2, 2, 2.5, interpolated


def test_fieller_ends_where_the_t_test_does() -> None:
    a, b = [6, 8, 11, 7, 7], [8, 9, 9, 8, 7]
    interval = study_report.fieller(a, b)
    assert interval
    for ratio in interval:
        differences = [x - ratio * y for x, y in zip(a, b, strict=True)]
        assert abs(mean(differences)) == pytest.approx(2.776 * stdev(differences) / sqrt(5))
    assert interval[0] < mean(a) / mean(b) < interval[1]
    assert study_report.fieller([1, 2], [1, 50]) is None  # the mean of b may be 0


# The report


def report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["study_report.py", str(folder / "plots"), "--runs", str(folder)]
    monkeypatch.setattr(sys, "argv", words)
    study_report.main()


def test_the_report_of_two_algorithms(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for algorithm, steps in (("cispo", (2, 4, 3, 2, 4)), ("dapo", (5, 6, 7, 5, 7))):
        tune(algorithm, dict(zip(RATES, [(9, 9), (8, 8), (7, 7), (MOST + 1, 6)], strict=True)))
        for seed, number in zip(SEEDS, steps, strict=True):
            setting = Setting(*CELL, algorithm, RATES[2], seed)
            make_run(setting, number)
            add_ledger(setting, [algorithm == "dapo" and i < 5 for i in range(10)])
    report(folder, monkeypatch)
    said = capsys.readouterr().out
    assert "| dapo | 9, 9 | 8, 8 | **7, 7** | > 40 (0.25), 6 |" in said
    assert "| gspo | –, – | –, – | –, – | –, – |" in said
    assert "Missing: 24 tuning runs, 15 measured runs." in said
    assert "| cispo | 0.0001 | 2, 4, 3, 2, 4 | 3.0 (1.8 to 4.2) | 0.50 (" in said
    assert "| dapo | 0.0001 | 5, 6, 7, 5, 7 | 6.0 (4.8 to 7.2) | – | 12.50 % | 0.50 → 0.50 | 3 |" in said
    assert "| cispo | 0.00 % | 0.00 % | 0.00 % | 0.00 % | none |" in said
    assert f"| dapo | 50.00 % | 0.00 % | 62.50 % | 0.00 % | `{RECHECK}` 50.00 % |" in said
    assert "differs by 2.0e-06 at most, the mean log-ratio by 1.0e-07" in said
    for name in ("rewards_3_16", "steps", "clipped"):
        assert (folder / f"plots/{name}.svg").read_text().startswith("<?xml")


def test_an_algorithm_that_does_not_always_get_there_has_no_mean() -> None:
    settings = [Setting(*CELL, "gspo", 1e-4, seed) for seed in SEEDS]
    for setting, steps in zip(settings, (12, MOST + 1, 30, 20, MOST + 1), strict=True):
        make_run(setting, steps)
    assert study_report.average(settings) == "median 30; 3 of 5 within 40"
    assert study_report.average(settings[1:2]) == "median > 40; 0 of 1 within 40"
    assert study_report.ratio({"gspo": settings, "dapo": settings}, "gspo", "dapo") == "–"


def test_without_runs_the_report_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no finished run of the study"):
        report(folder, monkeypatch)
