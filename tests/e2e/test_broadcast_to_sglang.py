"""Runs that broadcast their weights to a stand-in for SGLang, whose workers join as SGLang's do, over gloo."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from test_server_engines import STEPS, engine, ready, servers
from torch import Tensor

from sluice.config import TrainConfig
from sluice.configfile import load
from sluice.engines.sglang import Sglang
from sluice.errors import ConfigError
from sluice.weights.server_group import ServerGroup
from small_runs import events_of, finished, ledger_of, metrics_of, sluice

__all__ = ["ready"]  # a fixture
BROADCAST = "engine.publication=broadcast"
RANKS = ("trainer.name=fsdp", "trainer.num_ranks=2")


@pytest.mark.parametrize("trainer", [(), pytest.param(RANKS, marks=pytest.mark.proof)], ids=["local", "two ranks"])
def test_it_is_the_run_with_weights_by_a_folder(ready: Path, trainer: tuple[str, ...]):
    """All checks are on: each fingerprint is that of what was published."""
    settings = [*engine("sglang"), *trainer, "model.device=cpu"]
    by_folder = finished("train", "config.yaml", *settings, name="folder")
    run = finished("train", "config.yaml", *settings, BROADCAST)
    assert not events_of(run)
    assert not servers()
    for step in range(1, STEPS + 1):
        assert ledger_of(run, step) == ledger_of(by_folder, step)
    sizes = [metrics_of(made)[0]["perf/publish_bytes"] for made in (run, by_folder)]
    assert 0 < sizes[0] < sizes[1]  # a folder has a config and a tokeniser beside


def each_sample_was_trained_once(run: Path) -> None:
    """Of a run in which one server was killed."""
    died = [event for event in events_of(run) if event["kind"] == "engine_died"]
    assert len(died) == 1
    assert "SIGKILL" in died[0]["message"]
    rows = [row for step in range(1, STEPS + 1) for row in ledger_of(run, step) if row["trained"]]
    assert Counter((row["group"], row["index"]) for row in rows) == Counter(
        {(group, index): 1 for group in range(4 * STEPS) for index in range(4)}
    )
    assert not servers()


def test_a_server_that_is_killed_in_the_middle_of_a_publication_costs_no_sample(
    ready: Path, monkeypatch: pytest.MonkeyPatch
):
    send, killed = ServerGroup.send, list[int]()

    def killing(self: ServerGroup, weights: Iterable[tuple[str, Tensor]]) -> None:
        def sent() -> Any:
            for number, pair in enumerate(weights):
                if number == 3 and versions["sent"] == 3 and not killed:
                    killed.append(servers()[0])
                    os.kill(killed[0], signal.SIGKILL)
                yield pair

        versions["sent"] += 1
        send(self, sent())

    versions = Counter[str]()
    with monkeypatch.context() as patch:
        patch.setattr(ServerGroup, "send", killing)
        run = finished("train", "config.yaml", *engine("sglang"), BROADCAST, "rollout.max_staleness=1")
    assert len(killed) == 1
    each_sample_was_trained_once(run)


@pytest.mark.proof
def test_a_server_that_is_killed_as_it_joins_does_not_hold_the_ranks_up(ready: Path, monkeypatch: pytest.MonkeyPatch):
    """Rank 0 is in torch's own rendezvous then, and has minutes for it."""
    join, killed = Sglang._join, list[float]()

    async def killing(self: Sglang, *arguments: Any) -> None:
        if not killed:
            os.kill(servers()[0], signal.SIGKILL)
            await asyncio.sleep(0.5)
            killed.append(time.monotonic())
        elif len(killed) == 1:
            killed.append(time.monotonic())
        await join(self, *arguments)

    monkeypatch.setattr(Sglang, "_join", killing)
    words = [*RANKS, BROADCAST, "model.device=cpu", "rollout.max_staleness=1"]
    run = finished("train", "config.yaml", *engine("sglang"), *words)
    assert killed[1] - killed[0] < 60
    each_sample_was_trained_once(run)


def test_an_engine_with_stale_weights_is_caught_at_the_next_publication(
    ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Planted: at version 2 it gets those of version 1 once more."""
    send, before = ServerGroup.send, list[list[tuple[str, Tensor]]]()

    def forgetful(self: ServerGroup, weights: Iterable[tuple[str, Tensor]]) -> None:
        before.append([(name, weight.detach().clone()) for name, weight in weights])
        send(self, before[1] if len(before) == 3 else before[-1])

    monkeypatch.setattr(ServerGroup, "send", forgetful)
    settings = [*engine("sglang"), BROADCAST, "run.name=test", "run.num_threads=1"]
    assert sluice("train", "config.yaml", *settings) == 1
    assert "weights_match, step 2" in capsys.readouterr().err
    assert not servers()


SGLANG = ("engine.name=sglang", "engine.python=python")
RAY = ("placement.name=ray",)
COLOCATED = (*RAY, *RANKS, "placement.layout=colocated", "engine.replicas=2", "rollout.max_staleness=1")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["engine.sleep=true"], "cannot work with engine.sleep=true: trainer and server are on one GPU"),
        (["engine.quantization=fp8"], "cannot work with engine.quantization=fp8: SGLang rounds only weights"),
        (COLOCATED, "cannot work with placement.layout=colocated: trainer and server are on one GPU"),
    ],
)
def test_where_it_cannot_work_it_is_refused_and_weights_go_by_a_folder(
    ready: Path, words: Iterable[str], complaint: str
):
    with pytest.raises(ConfigError, match=complaint):
        load(TrainConfig, ["config.yaml"], [*SGLANG, BROADCAST, *words])
    assert load(TrainConfig, ["config.yaml"], [*SGLANG, *words, *RAY]).config.weights_go_by() == "disk"


def test_servers_that_ray_places_get_it_unless_they_are_told_otherwise(ready: Path):
    def way(*words: str) -> str:
        return load(TrainConfig, ["config.yaml"], [*SGLANG, *words]).config.weights_go_by()

    assert (way(), way(*RAY), way(*RAY, "engine.publication_folder=x")) == ("disk", "broadcast", "disk")
