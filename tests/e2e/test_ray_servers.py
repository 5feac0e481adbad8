"""Servers that Ray has placed: the same run as beside the trainer, at addresses of their nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray")

from test_server_engines import servers

from conftest import ROOT
from ray_clusters import joined_by_runs
from sluice.viewer import report
from small_runs import (
    events_of,
    finished,
    ledger_of,
    make_architecture,
    make_stand_in_python,
    metrics_of,
    set_up,
    sluice,
    without_timings,
    workplace,
)

VLLM = ROOT / ".venv-vllm/bin/python"


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, str]]:
    with joined_by_runs(4) as settings:
        yield settings


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(report, "write_report", lambda run: None)
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        make_architecture("model", "".join(map(chr, range(32, 127))), head_dim=32, hidden_size=64)
        make_stand_in_python(tmp_path / "python")
        yield tmp_path


@pytest.mark.proof
@pytest.mark.parametrize(
    ("kind", "replicas"),
    [("vllm", 2), ("sglang", 1), ("real vllm", 1)],
)
def test_it_is_the_run_with_servers_beside_the_trainer(ready: Path, cluster: tuple[str, str], kind: str, replicas: int):
    """Every column of the ledger and every metric; the server's address is the node's, and it ends with the run."""
    if kind.startswith("real") and not VLLM.exists():
        pytest.skip("`make vllm` installs vLLM, which this test needs")
    name, python = kind.removeprefix("real "), VLLM if kind.startswith("real") else "./python"
    words = [f"engine.name={name}", f"engine.python={python}", "engine.num_threads=1", f"engine.replicas={replicas}"]
    words += ["engine.deterministic=true"] if name == "sglang" else []
    words += ["model.random_weights=true", "model.device=cpu", "run.num_steps=3", "trainer.learning_rate=0.01"]
    here = finished("train", "config.yaml", *words)
    there = finished("train", "config.yaml", *words, *cluster, name="there")
    assert not events_of(there)
    assert not servers()
    for step in range(1, 4):
        assert ledger_of(here, step) == ledger_of(there, step)
    assert without_timings(metrics_of(here)) == without_timings(metrics_of(there))
    node = cluster[1].partition("=")[2].rpartition(":")[0]
    for log in there.glob("engine*.log"):
        said = log.read_text()
        assert re.findall(r"--host (\S+)", said)[0] == node != "127.0.0.1"
        assert f" on node {node}, process " in said


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["engine.gpus=[0]"], "engine.gpus cannot work with placement.name=ray"),
        (
            ["engine.tensor_parallel=2", "placement.engine_gpus=1"],
            "placement.engine_gpus=1 cannot work with engine.tensor_parallel=2",
        ),
        (
            ["engine.python=null", "engine.url=http://127.0.0.1:1", "placement.engine_cpus=2"],
            "placement.engine_cpus has no effect: no process is started for the engine",
        ),
    ],
)
def test_what_cannot_be_is_refused(ready: Path, words: list[str], complaint: str, capfd: pytest.CaptureFixture[str]):
    vllm = ("engine.name=vllm", "engine.python=./python", "model.random_weights=true")
    assert sluice("train", "config.yaml", "placement.name=ray", *vllm, *words) != 0
    assert complaint in capfd.readouterr().err
    assert not Path("runs").exists()
