"""The GSM8K recipe on the real questions, from random weights: `sluice sft`, then `sluice train`, and all that they write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT, shared_data
from makers import CHAT_TEMPLATE, make_bpe_tokenizer
from models import CONFIGS
from small_runs import (
    DRY_ONLY,
    documented_metrics,
    events_of,
    finished,
    ledger_of,
    metrics_of,
    without_timings,
    workplace,
    write_rows,
)

GSM8K_RECIPE = ROOT / "recipes/gsm8k.yaml"
SYSTEM_PROMPT = yaml.safe_load(GSM8K_RECIPE.read_text())["data"]["system_prompt"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder as the current one."""
    with workplace(tmp_path, monkeypatch):
        yield tmp_path


@pytest.fixture(scope="module")
def gsm8k_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of `sluice sft`: a tiny Qwen3 that has learnt to answer some GSM8K questions with a \\boxed number."""
    folder = tmp_path_factory.mktemp("gsm8k")
    rows = [json.loads(line) for line in shared_data("gsm8k/train.jsonl").read_text().splitlines()]
    make_bpe_tokenizer(folder / "model", [row["question"] for row in rows[:1000]], 768, CHAT_TEMPLATE)
    config = CONFIGS["qwen3"]()
    config.update({"vocab_size": 768, "max_position_embeddings": 1024})
    config.save_pretrained(folder / "model")
    taught = [
        {"prompt": row["question"], "response": f"\\boxed{{{row['answer'].rpartition('#### ')[2]}}}"}
        for row in sorted(rows, key=lambda row: len(row["question"]))[:96]
    ]
    sft = {
        "model": {"path": str(folder / "model"), "random_weights": True},
        "data": {"path": str(write_rows(folder / "taught.jsonl", taught)), "system_prompt": SYSTEM_PROMPT},
        "trainer": {"learning_rate": 1e-2, "samples_per_update": 8},
        "run": {"num_epochs": 2, "log_every": 4, "folder": str(folder)},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(sft))
    finished("sft", folder / "sft.yaml", name="base")
    return folder / "base"


def checkpoint_of(run: Path) -> Path:
    """The last one."""
    return max((run / "checkpoints").iterdir())


def gsm8k(base: Path, *settings: str, name: str = "test") -> Path:
    """The recipe as it stands but for paths and sizes."""
    sizes = ["rollout.groups_per_step=8", "rollout.group_size=4", "rollout.max_new_tokens=12", "run.num_steps=3"]
    paths = [f"model.path={checkpoint_of(base)}", f"data.path={shared_data('gsm8k/train.jsonl')}"]
    return finished("train", GSM8K_RECIPE, *paths, *sizes, *settings, name=name)


def test_sft_from_random_weights_learns(gsm8k_base: Path):
    losses = [line["train/loss"] for line in metrics_of(gsm8k_base)]
    assert losses[0] > 5.5  # of random weights: log 768 is 6.6
    assert losses[-1] < 1.5
    assert [line["step"] for line in metrics_of(gsm8k_base)] == [4, 8, 12, 16, 20, 24]
    assert (gsm8k_base / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_gsm8k_recipe_runs_as_it_stands_and_leaves_a_whole_run_folder(gsm8k_base: Path, here: Path, dtype: str):
    run = gsm8k(gsm8k_base, *([] if dtype == "bfloat16" else [f"model.dtype={dtype}"]))
    lines = metrics_of(run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    rewards = {"rollout/reward/math", "rollout/reward/format"}
    for line in lines:
        assert documented_metrics() - {"rollout/reward/LABEL", DRY_ONLY} | rewards <= line.keys()
        assert all(isinstance(value, int | float) for value in line.values()), line  # null is a number that is none
        assert line["rollout/reward"] == pytest.approx(
            line["rollout/reward/math"] + 0.1 * line["rollout/reward/format"]
        )
        assert line["train/engine_logprob_diff/max"] < (1e-4 if dtype == "float32" else 0.1)
    assert lines[0]["rollout/reward/format"] > 0.1
    assert lines[0]["train/grad_norm"] > 0
    assert [line["train/learning_rate"] for line in lines] == pytest.approx([4e-7, 8e-7, 1e-6])  # warmup of 10 updates
    check_ledger(run)
    check_checkpoint(gsm8k_base, run, dtype)
    assert SYSTEM_PROMPT in (run / "config.yaml").read_text()
    assert "<script" in (run / "report.html").read_text()
    assert events_of(run) == []


def check_ledger(run: Path) -> None:
    """Every sample of every step, whole: text, tokens, parts, and where it comes from."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_of(run))
    questions = [json.loads(line) for line in shared_data("gsm8k/train.jsonl").read_text().splitlines()]
    for step in (1, 2, 3):
        rows = ledger_of(run, step)
        assert len(rows) == 8 * 4
        assert [len(list(group)) for _, group in groupby(rows, key=lambda row: row["group"])] == [4] * 8
        for row in rows:
            own = [t for t, version in enumerate(row["policy_versions"]) if version >= 0]
            ids = row["token_ids"]
            assert tokenizer.decode([ids[t] for t in own], skip_special_tokens=True) == row["response"]
            assert "".join(row["tokens"][: own[0]]).startswith(f"<|system|>{SYSTEM_PROMPT}<eos><|user|>")
            assert len(row["tokens"]) == len(ids) == len(row["ratios"]) == len(row["clipped"])
            assert {row["policy_versions"][t] for t in own} == {step - 1}
            assert row["reward_parts"].keys() == {"math", "format"}
            assert row["reward"] == pytest.approx(row["reward_parts"]["math"] + 0.1 * row["reward_parts"]["format"])
            assert row["outcome"] == "scored"
            line = int(row["where"].rpartition(":")[2])
            question = questions[line - 1]
            assert json.loads(row["messages"])[1]["content"] == question["question"]
            assert json.loads(row["reference"]) == question["answer"].rpartition("#### ")[2]
        assert sorted({row["update"] for row in rows}) == [0, 1, 2, 3]


def check_checkpoint(base: Path, run: Path, dtype: str) -> None:
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-000003"]
    start = AutoModelForCausalLM.from_pretrained(checkpoint_of(base)).state_dict()
    trained = AutoModelForCausalLM.from_pretrained(checkpoint_of(run))
    assert trained.dtype == getattr(torch, dtype)
    changed = [not torch.equal(start[name].to(trained.dtype), value) for name, value in trained.state_dict().items()]
    assert any(changed) if dtype == "bfloat16" else all(changed)
    assert AutoTokenizer.from_pretrained(checkpoint_of(run)).chat_template == CHAT_TEMPLATE


USERS = """\
from sluice.types import Trajectory

async def play(prompt, policy):
    messages = list(prompt.messages)
    messages.append(await policy.respond(messages))
    messages.append({"role": "user", "content": "Are you sure?"})
    await policy.respond(messages)
    return Trajectory(policy.turns, stop_reason="asked twice")

def parts(prompt, trajectory):
    assert prompt.metadata["question"] == prompt.messages[-1]["content"]
    return {"boxed": "\\\\boxed" in trajectory.response, "length": trajectory.num_response_tokens / 100}

def keep(group):
    return int(group.prompt.id.rpartition("-")[2]) % 2 == 0
"""


def test_environment_reward_and_filter_of_the_user(gsm8k_base: Path, here: Path):
    """All by dotted path from the current folder: two turns, a reward of two parts, every other prompt rejected."""
    Path("mine.py").write_text(USERS)
    hooks = ["rollout.environment=mine:play", "rollout.filter=mine:keep", "data.metadata=[question]"]
    settings = [*hooks, "rewards=[{name: mine:parts, weight: 2.0}]", "rollout.groups_per_step=4"]
    run, again = (gsm8k(gsm8k_base, *settings, name=name) for name in ("one", "two"))
    assert without_timings(metrics_of(run)) == without_timings(metrics_of(again))
    for step, line in enumerate(metrics_of(run), start=1):
        rows = ledger_of(run, step)
        boxed, length = line["rollout/reward/parts/boxed"], line["rollout/reward/parts/length"]
        assert line["rollout/reward"] == pytest.approx(2 * (boxed + length))
        assert length == pytest.approx(line["rollout/response_len/mean"] / 100)
        odd = {row["group"] for row in rows if int(row["prompt_id"].rpartition("-")[2]) % 2}
        assert len(odd) == line["rollout/rejected_groups"]
        assert {row["group"] for row in rows if row["rejected"] == "rollout.filter"} == odd
        assert len({row["group"] for row in rows if row["trained"]}) == 4
        assert {row["group"] for row in rows if row["trained"]}.isdisjoint(odd)
        assert {row["stop_reason"] for row in rows} == {"asked twice"}
        extended = 0
        for row in rows:
            turns = [own for own, _ in groupby(version >= 0 for version in row["policy_versions"])]
            assert turns in ([False, True], [False, True, False, True])
            if row["trained"]:
                assert [weight > 0 for weight in row["loss_weights"]] == [v >= 0 for v in row["policy_versions"]]
            extended += len(turns) == 4
        assert extended  # a first answer that is tokenised as it was written goes on in one sample
    assert sum(line["rollout/rejected_groups"] for line in metrics_of(run)) > 0
