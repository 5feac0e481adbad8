"""Every benchmark runs, on tiny models for a moment, and ends with the JSON line that it promises."""

from __future__ import annotations

import importlib
import json
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from sluice import run as run_module
from sluice.engines.embedded import EmbeddedEngine
from sluice.tracking.tracker import FileTracker
from small_runs import workplace

BENCHMARKS = ROOT / "benchmarks"
FIGURES = {"median", "min", "max", "runs"}
LINE = {
    *("benchmark", "results", "skipped", "versions", "threads", "cpu", "load_before_and_after", "variables"),
    "command",
}
CASES = ["--cases", "tiny:uniform", "tiny:rl_like"]
TINY_LENGTHS = ["--new-tokens", "4", "--longest", "8"]
TINY_STEP = ["--prompts", "2", "--samples", "2", "--steps", "1", "--warm-up", "1", *TINY_LENGTHS]

PEER = f"""\
#!{sys.executable}
import json, sys
print(json.dumps({{"versions": {{"peer": "1"}}}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    answer = {{"seconds": [1.0] * asked["steps"], "split": {{"all": 1.0}}}} if "steps" in asked else {{"seconds": 1.0}}
    print(json.dumps(answer | {{"tokens": asked.get("new_tokens")}}), flush=True)
"""
"""Stands in for the Python of an environment with TRL or vLLM, and answers as their sides do."""

Ran = Callable[..., dict[str, Any]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Ran]:
    """Runs a benchmark in this process, with one thread; gives what its last line says."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def ran(name: str, *words: str | Path, rounds: int = 2) -> dict[str, Any]:
        importlib.import_module(name).main([*map(str, words), "--rounds", str(rounds), "--threads", "1"])
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert set(said) == LINE
        assert said["benchmark"] == name
        assert said["threads"] == 1
        assert said["command"].startswith(f"python benchmarks/{name}.py ")
        assert said["versions"]["torch"]
        assert said["cpu"]["name"]
        assert said["variables"]["GOMP_SPINCOUNT"]
        return said

    with workplace(tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        yield ran
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(f"{BENCHMARKS}/"):
            del sys.modules[name]


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    script = tmp_path / "peer"
    script.write_text(PEER)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def test_every_script_that_make_bench_runs_is_tried_here():
    """One that is added has its test too; what needs a GPU is run where there is one."""
    tested = {
        "bounds",
        "rollout",
        "vllm_rollout",
        "step",
        "trainer",
        "growth",
        "overhead",
        "precision",
        "head",
        "profiling",
        "simulate",
    }
    scripts = {path.stem for path in BENCHMARKS.glob("*.py") if "reported(" in path.read_text()} - {"measuring", "gpu"}
    assert scripts == tested
    assert all(f"benchmarks/{name}.py" in (ROOT / "Makefile").read_text() for name in tested)


def test_bounds(run: Ran):
    said = run("bounds", "--sizes", "tiny", "--sequences", "2", "--largest", "128", "--copied", "1")
    assert {result["what"] for result in said["results"]} == {"copy", "square product", "decode step"}
    assert said["results"][0]["gigabytes_per_s"]["median"] > 0
    assert all(set(result["gflops"]) == FIGURES for result in said["results"][1:])


@pytest.mark.proof
def test_rollout(run: Ran):
    said = run("rollout", *CASES, "--slots", "3", *TINY_LENGTHS, "--against-bound", "tiny")
    uniform, rl_like, against_bound = said["results"]
    for result in (uniform, rl_like):
        assert set(result["tokens_per_s"]) == {"sluice", "generate", "continuous_batching"}
        assert set(result["sluice_over"]) == {"generate", "continuous_batching"}
    assert rl_like["prompts"] == 4 * rl_like["slots"]
    assert set(against_bound["tokens_per_s"]) == {"sluice"}
    for result in said["results"]:
        assert set(result["share_of_bound"]) == set(result["share_of_square_product"]) == FIGURES


def test_vllm_rollout(run: Ran, peer: Path):
    said = run("vllm_rollout", *CASES, "--slots", "2", *TINY_LENGTHS, "--vllm", peer, "--ways", "in_process")
    assert [result["lengths"] for result in said["results"]] == ["uniform", "rl_like"]
    assert all(set(result["sluice_over_vllm"]) == FIGURES for result in said["results"])


def test_what_is_not_installed_is_said_to_be_skipped(run: Ran):
    said = run("vllm_rollout", "--vllm", "nowhere")
    assert not said["results"]
    assert said["skipped"] == ["vLLM, since there is no nowhere: `make vllm` makes it"]


def test_a_peer_that_fails_is_skipped_with_its_last_words(run: Ran, peer: Path):
    peer.write_text(f"#!{sys.executable}\nraise SystemExit('no AVX')\n")
    said = run("vllm_rollout", *CASES, "--vllm", peer)
    assert not said["results"]
    assert len(said["skipped"]) == 1
    assert all("no AVX" in what for what in said["skipped"])


def test_step(run: Ran, peer: Path):
    """Our side is `sluice train` itself, TRL's is played."""
    said = run("step", "--cases", "tiny:rl_like", "--trl", peer, *TINY_STEP)
    (result,) = said["results"]
    assert set(result["step_s"]) == set(result["split_s"]) == set(result["versions"]) == {"sluice", "trl"}
    assert set(result["trl_over_sluice"]) == FIGURES
    split = result["split_s"]["sluice"]
    assert split["rollout"] > 0
    assert split["train"] > 0
    assert sum(split.values()) < 1.1 * result["step_s"]["sluice"]["max"]


def test_profiling(run: Ran):
    """All phases of the step, and what is watched is left as it was."""
    before = EmbeddedEngine.generate, FileTracker.log
    said = run("profiling", "--cases", "tiny:rl_like", "--most", "200", *TINY_STEP)
    (result,) = said["results"]
    phases = dict(result["phases_ms"])
    assert phases.pop("step") == pytest.approx(sum(phases.values()), rel=0.01)
    assert {"rollout", "train", "record"} <= set(phases)
    assert any(row["name"] == "aten::mm" and row["calls"] > 0 for row in result["operators"])
    assert any("head_backward" in row["name"] for row in result["functions"])
    for rows in (result["operators"], result["functions"]):
        assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
        assert sum(row["share"] for row in rows) <= 1.001
    assert (EmbeddedEngine.generate, FileTracker.log) == before


def test_trainer(run: Ran):
    said = run("trainer", *CASES, "--samples", "4", *TINY_LENGTHS)
    assert [result["lengths"] for result in said["results"]] == ["uniform", "rl_like"]
    for result in said["results"]:
        for what in ("update_s", "tokens_per_s", "mfu", "time_over_bound", "speed_over_first_layout"):
            assert set(result[what]) == {"rows", "packed"}


@pytest.mark.proof
def test_head(run: Ran):
    said = run("head", "--tokens", "64", "--vocabulary", "2048", "--hidden", "32", "--length", "16")
    sides = {result["side"]: result for result in said["results"]}
    assert {"ours", "ours_coupled", "plain"} <= set(sides)
    assert sides["plain"]["seconds_over_plain"]["median"] == 1
    assert all(result["peak_mib"] >= 0 for result in said["results"])


def test_precision(run: Ran):
    """A rounded head takes engine and trainer further apart, and FP32 is exact."""
    said = run("precision", "--sizes", "tiny", "--sequences", "16", "--new-tokens", "16")
    exact, rounded, ours = (result["mean_difference"] for result in said["results"])
    assert exact < 1e-5 < ours < rounded
    assert all(0.9 < result["correlation"] <= 1 for result in said["results"])


def test_growth(run: Ran):
    points = ["--samples", "2", "--length", "--vocabulary", "--rows", "10", "20000"]
    said = run("growth", "--size", "tiny", *points)
    samples, rows = said["results"]
    assert [point["samples"] for point in samples["points"]] == [2]
    assert samples["points"][0]["memory_mib"] > 0
    assert rows["growth"][0]["rows"] == 2000
    assert rows["growth"][0]["mib_per_added"] < 1e-3  # a kilobyte


def test_overhead(run: Ran):
    small = ["rollout.groups_per_step=2", "rollout.max_new_tokens=4", "trainer.updates_per_batch=1"]
    said = run("overhead", "--steps", "2", "--settings", *small, rounds=1)
    (result,) = said["results"]
    assert all(set(result[what]) == FIGURES for what in ("step_s", "checks_share", "both_over_neither"))


SMALL_CLUSTERS = ["--groups", "4", "--group-size", "4", "--steps", "2", "--jobs", "1"]


def test_simulate(run: Ran):
    """The three tables, for clusters with one layout and with several."""
    said = run(
        "simulate",
        "--gpus",
        "4",
        "64",
        "--max-staleness",
        "0",
        "1",
        "--agent-gpus",
        "4",
        "--failure-steps",
        "200",
        *SMALL_CLUSTERS,
    )
    by_table = {what: [r for r in said["results"] if r["what"] == what] for what in ("scaling", "failures", "agents")}
    assert [row["layout"] for row in by_table["scaling"]] == 2 * ["in turn", "apart, stale 0", "apart, stale 1"]
    for row in by_table["scaling"]:
        assert 0 <= row["staleness"] <= row["max_staleness"]
        assert 0 < row["engines_busy"] <= 1
        assert row["over_in_turn"] > 0
    quiet, *failing = by_table["failures"]
    assert quiet["happened"] == 0
    assert failing[-1]["happened"] > 0
    assert failing[-1]["tokens_per_s"] < quiet["tokens_per_s"]
    (agents,) = by_table["agents"]
    assert 0 < agents["tools_at_once"] <= agents["most_tools_at_once"] <= agents["environments_open"]


def test_simulate_says_what_does_not_fit(run: Ran):
    said = run("simulate", "--gpus", "8", "--model", "32B", "--only-scaling", *SMALL_CLUSTERS)
    assert said["results"] == []
    assert said["skipped"] == ["8 GPUs, which are too few for 32B"]


@pytest.fixture
def few_real_runs(run: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """How good the prediction is depends on the machine, and on longer runs than these."""
    calibration = importlib.import_module("calibration")
    short = calibration.LogNormal(4, 8, 8)
    monkeypatch.setattr(calibration, "SIZE", "tiny")
    monkeypatch.setattr(calibration, "FITTED", [calibration.Case(n, 2, short, 4) for n in (2, 3)])
    monkeypatch.setattr(calibration, "PREDICTED", [calibration.Case(2, 3, short, 8)])


@pytest.mark.parametrize(
    ("words", "num_predicted"), [(["--cpu-time"], 1), pytest.param([], 3, marks=pytest.mark.proof)]
)
@pytest.mark.usefixtures("few_real_runs")
def test_simulate_calibrated(run: Ran, words: list[str], num_predicted: int):
    """Real runs, with the engine in both places and asynchronous, and a prediction beside each; clock and engines are put back."""
    before = FileTracker.log, EmbeddedEngine.generate, run_module.time
    said = run("simulate", "--calibrate", "--steps", "1", *words, rounds=1)
    (result,) = said["results"]
    assert len(result["predicted"]) == num_predicted
    for case in result["predicted"]:
        assert case["measured_s"]["min"] > 0
        assert case["predicted_over_fastest"] > 0
    assert (FileTracker.log, EmbeddedEngine.generate, run_module.time) == before


def test_simulate_driver(run: Ran):
    said = run("simulate", "--driver", "--tokens", "2048", "--steps", "1", rounds=1)
    one, two = said["results"]
    assert (one["reward_workers"], two["reward_workers"]) == (1, 2)
    assert one["groups_per_s"]["median"] > 0
    assert {"rollout", "checks", "record"} <= set(one["phases_s"])
    assert two["functions"]
