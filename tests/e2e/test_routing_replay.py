"""`sluice train` with a mixture of experts whose trainer replays what the engine's routers chose."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from sluice.viewer import report
from small_runs import finished, ledger_of, metrics_of, set_up, sluice, workplace

STANDINS = ROOT / "tests/standins"
REPLAY = ("rollout.routing_replay=true", "trainer.updates_per_batch=2")
APART = ("engine.process=own", "engine.num_threads=1")
SERVER = (f"engine.python={sys.executable}", "engine.num_threads=1", "rollout.max_staleness=1")
"""A stand-in."""
LAYERS, TOP_K, EXPERTS = 2, 2, 8


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(report, "write_report", lambda run: None)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STANDINS), *filter(None, [os.environ.get("PYTHONPATH")])]))
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path, "qwen3_moe")
        yield tmp_path


@pytest.mark.parametrize(
    "words",
    [
        (),
        (*APART, "rollout.max_staleness=1"),
        pytest.param(
            (*APART, "trainer.name=fsdp", "trainer.num_ranks=2", "trainer.activation_checkpointing=true"),
            marks=pytest.mark.proof,
        ),
        ("trainer.layout=rows", "algorithm.kl_coef=0.1", "algorithm.old_logprobs=recomputed"),
        pytest.param(("trainer.lora_rank=2",), marks=pytest.mark.proof),
        (*SERVER, "engine.name=vllm"),
        pytest.param((*SERVER, "engine.name=sglang", "engine.deterministic=true"), marks=pytest.mark.proof),
    ],
    ids=["one_process", "asynchronous", "ranks", "rows_with_a_reference", "adapters", "vllm", "sglang"],
)
def test_the_experts_of_every_token_are_on_record_and_replayed(ready: Path, words: tuple[str, ...]):
    """Only the last token of a sample was never fed in. All checks of the run are on: engine and trainer compute one policy."""
    run = finished("train", "config.yaml", *REPLAY, *words)
    for step, line in enumerate(metrics_of(run), start=1):
        assert 0 <= line["train/router_mismatch"] < 0.4
        if "rollout.max_staleness=1" not in words:
            assert line["train/engine_logprob_diff/max"] < 1e-4
        for row in ledger_of(run, step):
            *known, last = np.frombuffer(row["routed_experts"], "<u2").reshape(len(row["token_ids"]), LAYERS, TOP_K)
            assert (last == 65535).all()
            experts = np.stack(known)
            assert experts.max() < EXPERTS
            assert (experts[..., 0] != experts[..., 1]).all()


@pytest.mark.parametrize(
    "words",
    [
        ("engine.publication=disk",),
        pytest.param(("trainer.name=fsdp", "trainer.num_ranks=2"), marks=pytest.mark.proof),
    ],
    ids=["disk", "ranks"],
)
def test_the_bias_by_which_a_router_chooses_gets_to_the_engine(ready: Path, words: tuple[str, ...]):
    """It is no parameter. Without it the engine would choose other experts."""
    set_up(ready, "glm4_moe")
    run = finished("train", "config.yaml", *APART, *words, "run.num_steps=2")
    assert all(line["train/engine_logprob_diff/max"] < 1e-4 for line in metrics_of(run))


def test_a_run_goes_on_with_the_experts_of_what_was_begun(ready: Path):
    """Its checkpoint holds completions, finished and not."""
    words = (*REPLAY, *APART, "rollout.max_staleness=1", "checkpoint.every_steps=1")
    run = finished("train", "config.yaml", *words)
    assert sluice("train", "--resume", run, "run.num_steps=5") == 0
    for row in ledger_of(run, 4):
        chosen = np.frombuffer(row["routed_experts"], "<u2").reshape(len(row["token_ids"]), -1)
        assert [(own == 65535).all() for own in chosen] == [False] * (len(chosen) - 1) + [True]


def test_a_recorded_step_is_made_again_by_the_recorded_experts(ready: Path, capsys: pytest.CaptureFixture[str]):
    run = finished("train", "config.yaml", *REPLAY)
    assert sluice("replay", run, "--step", "3") == 0
    assert capsys.readouterr().out.endswith("step 3: identical (16 samples)\n")


PARTS_OF_CONVERSATIONS = """\
from sluice.types import Trajectory


async def last_turn(prompt, policy):
    messages = [*prompt.messages]
    for _ in range(3):
        messages.append(await policy.respond(messages))
    return Trajectory(policy.turns[-1:])
"""


def test_a_turn_that_is_trained_alone_has_the_experts_of_all_that_was_said_before_it(ready: Path):
    """In the engine's pass over it for that turn."""
    Path("parts.py").write_text(PARTS_OF_CONVERSATIONS)
    run = finished("train", "config.yaml", *REPLAY, "rollout.environment=parts:last_turn", "run.num_steps=1")
    for row in ledger_of(run, 1):
        chosen = np.frombuffer(row["routed_experts"], "<u2").reshape(len(row["token_ids"]), -1)
        assert [(own == 65535).all() for own in chosen] == [False] * (len(chosen) - 1) + [True]
