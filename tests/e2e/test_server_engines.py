"""Runs with vLLM and SGLang as engines, through the command line: real vLLM in `make proof`, stand-ins for both always."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import ROOT
from sluice.config import TrainConfig
from sluice.configfile import load
from sluice.data.chat import Chat, load_tokenizer
from sluice.engines.sglang import Sglang
from sluice.engines.vllm import Vllm
from sluice.launch import ranks
from sluice.launch.checked import check
from sluice.launch.colocated import ColocatedTrainer
from sluice.launch.models import engine_and_trainer
from sluice.launch.placing import Placement
from sluice.trainers.ranks import RankedTrainer
from sluice.viewer import report
from small_runs import events_of, finished, ledger_of, make_architecture, metrics_of, set_up, sluice, workplace

STANDINS = ROOT / "tests/standins"
VLLM = ROOT / ".venv-vllm/bin/python"


def in_proof(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.proof)


STEPS = 4


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(report, "write_report", lambda run: None)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STANDINS), *filter(None, [os.environ.get("PYTHONPATH")])]))
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        make_architecture("model", "".join(map(chr, range(32, 127))), head_dim=32, hidden_size=64)
        yield tmp_path


OF_WAYS = {
    "": ["model.random_weights=true"],
    "broadcast": ["model.random_weights=true", "engine.publication=broadcast"],
    "adapter": ["engine.lora=adapter", "trainer.lora_rank=3", "trainer.lora_alpha=10"],
}
"""Settings for ways in which weights reach a server."""


def engine(kind: str, way: str = "") -> list[str]:
    """Settings for one."""
    if kind.startswith("real") and not VLLM.exists():
        pytest.skip("`make vllm` installs vLLM, which this test needs")
    python = VLLM if kind.startswith("real") else sys.executable
    name = kind.removeprefix("real ")
    deterministic = ["engine.deterministic=true"] if name == "sglang" else []
    words = [f"engine.name={name}", f"engine.python={python}", "engine.num_threads=1", *deterministic]
    if way == "adapter":
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("model")).save_pretrained("model")
    return [*words, *OF_WAYS[way], f"run.num_steps={STEPS}", "trainer.learning_rate=0.01"]


def servers() -> list[int]:
    """Processes of servers that were started with the model of this folder."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (path / "cmdline").read_bytes()
            is_one = b"sglang.launch_server" in command or b"vllm.entrypoints.openai.api_server" in command
            if is_one and os.readlink(path / "cwd") == os.getcwd():
                found.append(int(path.name))
    return sorted(found)


@pytest.mark.parametrize(
    ("kind", "way", "staleness"),
    [
        ("vllm", "", 0),
        ("vllm", "broadcast", 0),
        ("vllm", "adapter", 2),
        ("sglang", "", 2),
        in_proof("vllm", "", 2),
        in_proof("sglang", "", 0),
        in_proof("real vllm", "", 0),
        in_proof("real vllm", "", 2),
        in_proof("real vllm", "broadcast", 2),
        in_proof("real vllm", "adapter", 2),
    ],
)
def test_it_trains_and_says_which_weights_made_each_token(ready: Path, kind: str, way: str, staleness: int):
    """All checks of the run are on. Log-probs are those of the checkpoint of the version that a token names."""
    settings = [*engine(kind, way), f"rollout.max_staleness={staleness}", "rollout.max_new_tokens=24"]
    settings += ["checkpoint.every_steps=1", "checkpoint.keep_last=null"]
    run = finished("train", "config.yaml", *settings)
    assert not servers()
    assert not events_of(run)
    assert not (run / "weights").exists()
    ages: set[int] = set()
    for step in range(1, STEPS + 1):
        for row in ledger_of(run, step):
            own = [t for t, weight in enumerate(row["loss_weights"]) if weight]
            versions = {row["policy_versions"][t] for t in own}
            ages |= {step - 1 - version for version in versions}
            for version in versions - {0}:
                model = AutoModelForCausalLM.from_pretrained(run / f"checkpoints/step-{version:06d}")
                with torch.no_grad():
                    logp = model(torch.tensor([row["token_ids"]])).logits[0].log_softmax(-1)
                for t in own:
                    if row["policy_versions"][t] == version:
                        assert abs(float(logp[t - 1, row["token_ids"][t]]) - row["logprobs"][t]) < 1e-4
    assert max(ages) <= staleness
    assert (max(ages) > 0) == (staleness > 0)
    if not staleness:
        assert max(line["train/engine_logprob_diff/max"] for line in metrics_of(run)) < 1e-4


@pytest.mark.parametrize(
    ("kind", "way", "staleness"),
    [
        ("vllm", "", 1),
        in_proof("vllm", "broadcast", 1),
        in_proof("vllm", "", 0),
        in_proof("vllm", "adapter", 1),
        in_proof("sglang", "", 0),
        in_proof("sglang", "", 1),
        in_proof("real vllm", "", 0),
        in_proof("real vllm", "", 1),
        in_proof("real vllm", "broadcast", 1),
        in_proof("real vllm", "adapter", 1),
    ],
)
def test_a_killed_server_costs_no_sample(
    ready: Path, kind: str, way: str, staleness: int, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is lost, nothing is trained twice; and without staleness it is the run without kills."""
    generate, asked, killed = (Vllm if "vllm" in kind else Sglang).generate, Counter[str](), list[int]()

    async def watched(self: Any, *arguments: Any) -> Any:
        asked["generate"] += 1
        if asked["generate"] == 20:
            killed.append(servers()[0])
            threading.Timer(0.05, lambda: os.kill(killed[-1], signal.SIGKILL)).start()
        return await generate(self, *arguments)

    settings = [*engine(kind, way), f"rollout.max_staleness={staleness}", "rollout.max_new_tokens=40"]
    monkeypatch.setenv("STANDIN_STEP_S", "0.01")
    with monkeypatch.context() as patch:
        patch.setattr(Vllm if "vllm" in kind else Sglang, "generate", watched)
        run = finished("train", "config.yaml", *settings)
    died = [event for event in events_of(run) if event["kind"] == "engine_died"]
    assert len(killed) == len(died) == 1
    assert "SIGKILL" in died[0]["message"]
    rows = [row for step in range(1, STEPS + 1) for row in ledger_of(run, step) if row["trained"]]
    assert Counter((row["group"], row["index"]) for row in rows) == Counter(
        {(group, index): 1 for group in range(4 * STEPS) for index in range(4)}
    )
    assert not servers()


@pytest.mark.parametrize("kind", ["sglang", in_proof("vllm"), in_proof("real vllm")])
def test_an_engine_with_stale_weights_is_caught_at_the_next_publication(
    ready: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Z6. Planted: at version 2 it takes no weights, and answers that it did."""
    cls = Vllm if "vllm" in kind else Sglang
    load = cls.load

    async def forgetful(self: Any, http: Any, folder: Path, version: int) -> None:
        if version != 2:
            await load(self, http, folder, version)

    monkeypatch.setattr(cls, "load", forgetful)
    assert sluice("train", "config.yaml", *engine(kind), "run.name=test", "run.num_threads=1") == 1
    said = capsys.readouterr().err
    assert "weights_match, step 2" in said
    assert not servers()


@pytest.mark.parametrize("way", ["adapter", in_proof("broadcast")])
def test_ranks_publish_to_servers(ready: Path, way: str):
    """What two ranks have shards of arrives whole at two servers, which the checks of the run see to; of an adapter little is moved."""
    fsdp = ["trainer.name=fsdp", "trainer.num_ranks=2", "model.device=cpu", "engine.replicas=2", "run.num_steps=2"]
    run = finished("train", "config.yaml", *engine("vllm", way), *fsdp)
    weights = AutoModelForCausalLM.from_pretrained(run / "checkpoints/step-000002")
    size = sum(weight.nbytes for weight in weights.parameters())
    moved = metrics_of(run)[-1]["perf/publish_bytes"]
    assert 0 < moved < size if way == "adapter" else moved >= size


def test_several_servers_share_the_work(ready: Path):
    run = finished("train", "config.yaml", *engine("vllm"), "engine.replicas=2", "run.num_steps=2")
    made = [sum(line[f"perf/engine_requests/{k}"] for line in metrics_of(run)) for k in range(2)]
    assert made == [16, 16]  # of 2 steps of 4 groups of 4
    assert all((run / f"engine-{k}.log").read_text() for k in range(2))
    assert not servers()


def test_a_run_is_resumed(ready: Path):
    settings = [*engine("vllm"), "checkpoint.every_steps=2"]
    whole = finished("train", "config.yaml", *settings, name="whole")
    finished("train", "config.yaml", *settings, "run.num_steps=2", name="half")
    assert sluice("train", "--resume", "runs/half", f"run.num_steps={STEPS}") == 0
    assert ledger_of(Path("runs/half"), STEPS) == ledger_of(whole, STEPS)
    assert sluice("replay", "runs/half", "--steps", "4") in (0, 2)


def test_a_start_that_fails_ends_the_run_in_a_sentence(ready: Path, capsys: pytest.CaptureFixture[str]):
    words = ["engine.name=vllm", "engine.python=/nowhere/python", "model.random_weights=true"]
    assert sluice("train", "config.yaml", *words, "run.name=test") == 2
    assert "error: engine.python=/nowhere/python does not run" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_check_looks_for_the_server_and_tries_without_it(ready: Path, capsys: pytest.CaptureFixture[str]):
    assert sluice("check", "config.yaml", *engine("vllm")) == 0
    said = capsys.readouterr().out
    assert f"vllm by {sys.executable}; it is not started" in said
    assert "the embedded engine sampled in place of engine.name=vllm" in said
    assert sluice("check", "--offline", "config.yaml", *engine("vllm"), "engine.python=/bin/false") == 2
    assert "engine.python=/bin/false has no package vllm" in capsys.readouterr().out
    words = ["engine.name=sglang", "engine.url=http://127.0.0.1:1", "model.random_weights=true"]
    assert sluice("check", "--offline", "config.yaml", *words) == 2
    assert "no server answers at engine.url=http://127.0.0.1:1" in capsys.readouterr().out


PYTHON = "engine.python=python"
ADAPTER, LORA = "engine.lora=adapter", "trainer.lora_rank=4"


def test_ranks_on_gpus_share_them_with_a_server_that_sleeps(ready: Path, monkeypatch: pytest.MonkeyPatch):
    """As far as it can be without a GPU: nothing is started. What a run tells its trainer comes to the ranks."""
    monkeypatch.setattr(ranks, "gpus_of", lambda config: 2)
    words = ["engine.name=vllm", PYTHON, "engine.sleep=true", "trainer.name=fsdp"]
    config = load(TrainConfig, ["config.yaml"], words).config
    trainer: Any = engine_and_trainer(config, check(config), Chat(load_tokenizer("model")), Placement()).trainer
    trainer.belongs_to(Path("runs/test"))
    assert isinstance(trainer, ColocatedTrainer)
    assert isinstance(trainer._trainer, RankedTrainer)
    assert trainer._trainer._run_folder == Path("runs/test")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["engine.name=vllm"], "one of engine.python"),
        (["engine.name=vllm", PYTHON, "engine.url=http://localhost:1"], "and not both"),
        (["engine.name=vllm", "engine.url=http://far:1"], "or engine.publication_folder to a folder"),
        (
            ["engine.name=vllm", PYTHON, "engine.publication=broadcast", "engine.publication_folder=x"],
            "has no effect with engine.publication=broadcast",
        ),
        (["engine.name=vllm", PYTHON, ADAPTER], "has no effect without trainer.lora_rank"),
        (["engine.name=vllm", PYTHON, ADAPTER, LORA], "cannot work with model.random_weights=true"),
        (
            ["engine.name=vllm", PYTHON, ADAPTER, LORA, "model.random_weights=false", "engine.publication=broadcast"],
            "reads an adapter from a folder",
        ),
        (
            ["engine.name=vllm", PYTHON, ADAPTER, "trainer.lora_rank=600", "model.random_weights=false"],
            "vLLM takes 512 at most",
        ),
        (["engine.name=vllm", "engine.url=http://localhost:1", "engine.num_slots=4"], "engine.num_slots has no effect"),
        (["engine.name=vllm", "engine.url=http://localhost:1", "engine.compile=true"], "engine.compile has no effect"),
        (["engine.name=vllm", "engine.url=far"], "looks like http://host:port"),
        (["engine.name=vllm", PYTHON, "engine.on_new_weights=finish"], "has no effect with rollout.max_staleness=0"),
        (["engine.name=vllm", PYTHON, "engine.gpus=[0,1,2]"], "name as many"),
        (["engine.name=vllm", PYTHON, "engine.draft_tokens=4"], "has no effect without engine.speculative"),
        (["engine.name=vllm", PYTHON, "engine.repetition_tokens=4"], "has no effect without engine.max_repetitions"),
        (["engine.name=vllm", PYTHON, "engine.sleep=true", "model.device=cpu"], "no effect on the CPU"),
        (["engine.name=vllm", PYTHON, "engine.sleep=true", "rollout.max_staleness=1"], "would sleep while"),
        (["engine.name=vllm", PYTHON, "rollout.top_p=0.9"], "needs rollout.top_k"),
        (["engine.name=vllm", PYTHON, "rollout.top_k=4000"], "may be 1024 at most"),
        (["engine.name=sglang", PYTHON, "rollout.top_k=4"], "cannot be had with engine.name=sglang"),
        (["engine.name=sglang", PYTHON, "engine.max_repetitions=4"], "max_repetitions"),
        (
            ["engine.name=vllm", PYTHON, "engine.quantization=fp8", "checks.first_update_ratio=warn"],
            "rounds the engine's",
        ),
        (["engine.name=vllm", PYTHON, "engine.sleep=true"], "there is no GPU to share"),
        (["engine.name=vllm", PYTHON, "engine.sleep=true", "trainer.name=fsdp"], "there is no GPU to share"),
    ],
)
def test_settings_that_cannot_work_are_refused(ready: Path, words: Sequence[str], complaint: str, capsys: Any):
    if "no GPU" in complaint and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert sluice("train", "config.yaml", "model.random_weights=true", *words) != 0
    assert complaint in capsys.readouterr().err
