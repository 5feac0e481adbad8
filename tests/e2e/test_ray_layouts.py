"""Engines and ranks on GPUs of their own, or together: on a cluster whose GPUs are pretended, where processes land and what they would see."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray")

from ray_clusters import joined_by_runs
from sluice.config import TrainConfig
from sluice.configfile import load
from sluice.configplacement import RayPlacement
from sluice.launch.placing import bundles_of
from sluice.viewer import report
from small_runs import finished, ledger_of, make_stand_in_python, metrics_of, set_up, sluice, without_timings, workplace

RANKS = ("engine.process=own", "engine.num_threads=1", "trainer.name=fsdp", "trainer.num_ranks=2")
COLOCATED = "placement.layout=colocated"
SEEN = """\
import os
import time

from sluice.processes import belong_to


def serve(fd, parent):
    with belong_to(parent, fd) as pipe:
        pipe.sendall(os.environ["CUDA_VISIBLE_DEVICES"].encode())
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, str]]:
    with joined_by_runs(8, num_gpus=8) as settings:
        yield settings


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(report, "write_report", lambda run: None)
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        make_stand_in_python(tmp_path / "python")
        yield tmp_path


def devices_seen(config: TrainConfig) -> dict[str, set[str]]:
    """By the name of a place, in the order in which engines are there before their ranks."""
    from sluice.distributed.cluster import Cluster
    from sluice.distributed.process import RayProcess

    Path("seen.py").write_text(SEEN)
    assert isinstance(config.placement, RayPlacement)
    joined = Cluster(config.placement.address, num_cpus=1, variables={}, start_limit_s=120, lost_after_s=10)
    running: dict[str, RayProcess] = {}
    try:
        bundles = bundles_of(config, config.placement, joined.has_gpus())
        joined.reserve(bundles, "PACK")
        path = [str(Path.cwd()), *sys.path]
        for name in sorted(place.name for bundle in bundles for place in bundle):
            running[name] = RayProcess(joined, name, "seen", path=path, folder=str(Path.cwd()), log=None, variables={})
        return {name: set(process.connect().recv(100).decode().split(",")) for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
        joined.close()


@pytest.mark.proof
def test_apart_each_has_gpus_of_its_own(ready: Path, cluster: tuple[str, str]):
    words = ["engine.name=vllm", "engine.python=./python", "engine.tensor_parallel=2", "engine.replicas=2"]
    seen = devices_seen(load(TrainConfig, ["config.yaml"], [*words, *RANKS[2:], *cluster]).config)
    assert {name: len(devices) for name, devices in seen.items() if name != "reward-0"} == {
        **dict.fromkeys(("engine-0", "engine-1"), 2),
        **dict.fromkeys(("trainer-0", "trainer-1"), 1),
    }
    assert len(set.union(*(devices for name, devices in seen.items() if name != "reward-0"))) == 6
    assert seen["reward-0"] == {""}


@pytest.mark.proof
def test_colocated_an_engine_sees_the_gpus_of_its_ranks(ready: Path, cluster: tuple[str, str]):
    words = ["engine.name=vllm", "engine.python=./python", "engine.memory_fraction=0.4", "engine.replicas=2"]
    words += ["engine.tensor_parallel=2", "trainer.name=fsdp", "trainer.num_ranks=4"]
    seen = devices_seen(load(TrainConfig, ["config.yaml"], [*words, COLOCATED, *cluster]).config)
    ranks = [seen[f"trainer-{rank}"] for rank in range(4)]
    assert all(len(devices) == 1 for devices in ranks)
    assert len(set.union(*ranks)) == 4
    assert [seen["engine-0"], seen["engine-1"]] == [ranks[0] | ranks[1], ranks[2] | ranks[3]]
    assert seen["reward-0"] == {""}


@pytest.mark.proof
def test_colocated_is_the_run_of_places_apart(ready: Path, cluster: tuple[str, str]):
    """Without GPUs."""
    words = (*RANKS, "engine.replicas=2", "model.device=cpu", *cluster)
    apart = finished("train", "config.yaml", *words)
    together = finished("train", "config.yaml", *words, COLOCATED, name="together")
    for step in (1, 2, 3):
        assert ledger_of(apart, step) == ledger_of(together, step)
    assert without_timings(metrics_of(apart)) == without_timings(metrics_of(together))


OURS = ("engine.process=own", "engine.replicas=2", "trainer.name=fsdp", "trainer.num_ranks=2")
VLLM = ("engine.name=vllm", "engine.python=./python", "engine.replicas=2", "trainer.name=fsdp", "trainer.num_ranks=2")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (OURS[:2], "placement.layout=colocated has no effect without trainer.name=fsdp"),
        ((*OURS, "engine.replicas=1"), "trainer.num_ranks=2 and engine.replicas=1: every rank shares its GPU with one"),
        ((*OURS, "placement.engine_gpus=1"), "placement.engine_gpus has no effect with placement.layout=colocated"),
        ((*OURS, "placement.rank_gpus=0.5"), "placement.rank_gpus=0.5 cannot work with placement.layout=colocated"),
        ((*VLLM, "engine.tensor_parallel=2"), "engine.replicas=2 of 2 GPUs each (engine.tensor_parallel)"),
        (VLLM, "placement.layout=colocated needs engine.memory_fraction with engine.name=vllm"),
    ],
)
def test_what_cannot_be_is_refused(
    ready: Path, cluster: tuple[str, str], words: tuple[str, ...], complaint: str, capfd: pytest.CaptureFixture[str]
):
    assert sluice("train", "config.yaml", COLOCATED, *cluster, *words) == 2
    assert complaint in capfd.readouterr().err
    assert not Path("runs").exists()
