"""`sluice train` with sharded trainer ranks: the run of one process, its engine beside it, and what a killed rank costs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from same import assert_same_runs
from sluice.viewer import report
from small_runs import events_of, finished, ledger_of, metrics_of, set_up, sluice, workplace

APART = ("engine.process=own", "engine.num_threads=1")
RANKS = (*APART, "trainer.name=fsdp", "trainer.num_ranks=2")


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(report, "write_report", lambda run: None)
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        yield tmp_path


def ranks_running() -> list[int]:
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"sluice.trainers.rank" in (stat.parent / "cmdline").read_bytes():
                found.append(int(stat.parent.name))
    return found


def close(one: Any, other: Any) -> bool:
    return one == pytest.approx(other, rel=1e-3, abs=1e-4, nan_ok=True)


def test_two_ranks_make_the_run_of_one_process(ready: Path):
    """Every check of the run is on, the weights that the engine decodes with among them. KL, so there is a reference."""
    words = ("algorithm.kl_coef=0.1", "algorithm.old_logprobs=recomputed", "trainer.updates_per_batch=2")
    one = finished("train", "config.yaml", *APART, *words)
    two = finished("train", "config.yaml", *RANKS, *words, name="two")
    for before, after in zip(metrics_of(one), metrics_of(two), strict=True):
        assert before.keys() == after.keys()
        assert {k: v for k, v in after.items() if not k.startswith("perf/")} == {
            k: pytest.approx(v, rel=1e-3, abs=1e-4, nan_ok=True) for k, v in before.items() if not k.startswith("perf/")
        }
    for step in (1, 2, 3):
        for row, other in zip(ledger_of(one, step), ledger_of(two, step), strict=True):
            assert row["token_ids"] == other["token_ids"]
            for column in ("old_logprobs", "ref_logprobs", "current_logprobs", "ratios", "advantages"):
                assert close(row[column], other[column]), column
            assert (row["update"], row["clipped"]) == (other["update"], other["clipped"])
    checkpoint = two / "checkpoints/step-000003"
    weights, expected = (load_file(c / "model.safetensors") for c in (checkpoint, one / "checkpoints/step-000003"))
    assert weights.keys() == expected.keys()
    assert all(close(weights[name].flatten().tolist(), expected[name].flatten().tolist()) for name in weights)
    AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not [event for event in events_of(two) if event["kind"] == "check"]
    assert not ranks_running()


@pytest.mark.proof
@pytest.mark.parametrize("publication", ["shared_memory", "disk"])
def test_two_ranks_train_the_adapters_of_one_process(ready: Path, publication: str):
    """The engine has what the ranks merged: it samples what it does beside one process, and that its weights are theirs is a check."""
    words = (
        f"engine.publication={publication}",
        "trainer.lora_rank=4",
        "trainer.learning_rate=1e-2",
        "algorithm.kl_coef=0.1",
    )
    one = finished("train", "config.yaml", *APART, *words)
    two = finished("train", "config.yaml", *RANKS, *words, name="two")
    for before, after in zip(metrics_of(one), metrics_of(two), strict=True):
        assert all(close(before[name], after[name]) for name in before if not name.startswith("perf/"))
    assert [row["token_ids"] for row in ledger_of(one, 3)] == [row["token_ids"] for row in ledger_of(two, 3)]
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        expected, written = (load_file(run / "checkpoints/step-000003" / file) for run in (one, two))
        assert written.keys() == expected.keys()
        assert all(close(written[name].flatten().tolist(), expected[name].flatten().tolist()) for name in expected)
    assert not [event for event in events_of(two) if event["kind"] == "check"]


@pytest.mark.proof
@pytest.mark.parametrize("publication", ["broadcast", "disk"])
def test_weights_reach_the_engine_from_rank_0_in_every_way(ready: Path, publication: str):
    """Beside an engine that samples ahead; the fingerprints are compared in the run."""
    run = finished("train", "config.yaml", *RANKS, f"engine.publication={publication}", "rollout.max_staleness=1")
    assert len(metrics_of(run)) == 3
    assert not [event for event in events_of(run) if event["kind"] == "check"]


@pytest.mark.proof
def test_a_killed_rank_is_named_and_the_run_goes_on_from_its_checkpoint(
    ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Killed between its updates; gone on with, it is the run that was never interrupted, to the last bit."""
    from sluice.trainers.ranks import RankedTrainer

    words = (*RANKS, "checkpoint.every_steps=1", "run.num_steps=4", "checkpoint.keep_last=null")
    whole = finished("train", "config.yaml", *words, name="whole")
    optim_step = RankedTrainer.optim_step
    steps = []

    async def then_killed(self: RankedTrainer) -> Any:
        steps.append(1)
        if len(steps) == 3:
            threading.Timer(0.0, os.kill, (self._connections[1].process.pid, signal.SIGKILL)).start()
        return await optim_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(RankedTrainer, "optim_step", then_killed)
        assert sluice("train", "config.yaml", *words, "run.name=test", "run.num_threads=1") == 1
    said = capsys.readouterr().err
    assert "trainer rank 1 of 2: its process was killed (SIGKILL" in said
    assert "trainer-1.log" in said
    assert "--resume" in events_of(Path("runs/test"))[-1]["message"]
    assert not ranks_running()
    assert sluice("train", "--resume", "runs/test") == 0
    assert_same_runs(Path("runs/test"), whole, 4)


@pytest.mark.proof
def test_check_and_replay_of_a_run_with_ranks(ready: Path, capsys: pytest.CaptureFixture[str]):
    assert sluice("check", "config.yaml", *RANKS) == 0
    finished("train", "config.yaml", *RANKS)
    capsys.readouterr()
    assert sluice("replay", "runs/test", "--step", "1:3") == 0
    assert capsys.readouterr().out.count("identical") == 3
    assert sluice("replay", "runs/test", "--step", "3", "--algorithm", "gspo") != 0
    assert "can be replayed as they were" in capsys.readouterr().err
    assert not ranks_running()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["trainer.name=fsdp"], "set engine.process=own"),
        ([*RANKS, "trainer.tensor_parallel=4"], "must divide trainer.num_ranks=2"),
        (
            [*RANKS, "trainer.compile=true", "trainer.tensor_parallel=2"],
            "trainer.compile does not work with trainer.tens",
        ),
        ([*RANKS, "trainer.lora_targets=[q_proj]"], "trainer.lora_targets has no effect without trainer.lora_rank"),
        ([*RANKS, "trainer.lora_rank=4", "trainer.lora_targets=[nosuch]"], "has no linear layer called nosuch"),
        ([*RANKS, "trainer.cpu_offload=true", "model.device=cpu"], "has no effect without a GPU"),
        ([*RANKS, "trainer.num_ranks=4", "trainer.tensor_parallel=4"], "must divide the model's 4 heads and 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    ready: Path, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
):
    assert sluice("train", "config.yaml", *words) != 0
    assert complaint in capsys.readouterr().err
    assert not ranks_running()
