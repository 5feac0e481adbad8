"""Whole runs through `sluice train` and `sluice sft`: what they write, that engine and trainer agree, that they learn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import ROOT, shared_data
from makers import CHAT_TEMPLATE, make_bpe_tokenizer
from models import CONFIGS
from small_runs import (
    documented_metrics,
    events_of,
    finished,
    ledger_of,
    make_architecture,
    metrics_of,
    set_up,
    without_timings,
    workplace,
    write_config,
    write_rows,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from sluice.config import TrainConfig
from sluice.configfile import load
from sluice.engines import embedded

GSM8K_RECIPE = ROOT / "recipes/gsm8k.yaml"
SYSTEM_PROMPT = yaml.safe_load(GSM8K_RECIPE.read_text())["data"]["system_prompt"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder as the current one."""
    with workplace(tmp_path, monkeypatch):
        yield tmp_path


@pytest.fixture
def ready(here: Path) -> Path:
    """The same with everything for `sluice train config.yaml`."""
    set_up(here)
    return here


# GSM8K, from random weights


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
        assert documented_metrics() - {"rollout/reward/LABEL"} | rewards <= line.keys()
        assert all(isinstance(value, int | float) for value in line.values()), line  # null is a number that is none
        assert line["rollout/reward"] == pytest.approx(
            line["rollout/reward/math"] + 0.1 * line["rollout/reward/format"]
        )
        assert line["train/engine_logprob_diff/max"] < (1e-4 if dtype == "float32" else 0.1)
    assert lines[0]["rollout/reward/format"] > 0.1
    assert lines[0]["train/grad_norm"] > 0
    assert [line["train/learning_rate"] for line in lines] == pytest.approx([4e-7, 8e-7, 1e-6])  # warmup of 10 updates
    check_ledger(run, dtype)
    check_checkpoint(gsm8k_base, run, dtype)
    assert SYSTEM_PROMPT in (run / "config.yaml").read_text()
    assert "<script" in (run / "report.html").read_text()
    assert events_of(run) == []


def check_ledger(run: Path, dtype: str) -> None:
    """Every sample of every step, whole: text, tokens, parts, and where it comes from."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_of(run))
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
            question = json.loads(shared_data("gsm8k/train.jsonl").read_text().splitlines()[line - 1])
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


def test_the_config_of_a_run_is_the_config_that_ran(ready: Path):
    settings = ["trainer.learning_rate=2e-3", "run.name=test", "run.num_threads=1"]
    run = finished("train", "config.yaml", *settings[:1])
    again = load(TrainConfig, [str(run / "config.yaml")])
    assert again.config == load(TrainConfig, ["config.yaml"], settings).config
    assert "learning_rate: 0.002  # command line" in (run / "config.yaml").read_text()
    about = json.loads((run / "environment.json").read_text())
    assert about["versions"]["torch"] == torch.__version__
    assert all(about["versions"].values())


# Engine and trainer agree (what the ratio divides by is the engine's word)


@pytest.mark.parametrize("updates", [1, 4])
@pytest.mark.parametrize("layout", ["rows", "packed"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2", "gemma3"])
def test_engine_and_trainer_give_one_logprob(here: Path, architecture: str, layout: str, updates: int):
    set_up(here, architecture)
    run = finished(
        "train",
        "config.yaml",
        f"trainer.layout={layout}",
        f"trainer.updates_per_batch={updates}",
        "trainer.tokens_per_micro_batch=64",
        "rollout.temperature=0.7",
    )
    assert_agreement(run, updates)


def assert_agreement(run: Path, updates: int) -> None:
    lines = metrics_of(run)
    assert len(lines) == 3
    for line in lines:
        assert 0 < line["train/grad_norm"]  # the weights do move between the steps
        assert line["train/engine_logprob_diff/max"] < 1e-4
        if updates == 1:
            assert abs(line["train/ppo_kl"]) < 1e-5
            assert line["train/pg_clipfrac"] == 0
    for step in (1, 2, 3):
        first = [row for row in ledger_of(run, step) if row["update"] == 0]
        assert len(first) == 16 // updates
        for row in first:
            assert row["old_logprobs"] == row["logprobs"]
            own = [t for t, weight in enumerate(row["loss_weights"]) if weight]
            difference = sum(row["current_logprobs"][t] - row["logprobs"][t] for t in own) / len(own)
            assert abs(difference) < 1e-5
            assert not any(row["clipped"])


def _offset(sample: Any) -> Any:
    """An engine whose log-probs are off by a thousandth."""
    return lambda *args: ((drawn := sample(*args))[0], drawn[1] + 1e-3)


def _untempered(sample: Any) -> Any:
    """An engine that samples at the temperature and forgets it in its log-probs."""

    def forgetful(logits: torch.Tensor, *rest: Any) -> Any:
        tokens, _ = sample(logits, *rest)
        return tokens, torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]

    return forgetful


@pytest.mark.parametrize("mistake", [_offset, _untempered])
def test_a_mistake_of_the_engine_shows(ready: Path, monkeypatch: pytest.MonkeyPatch, mistake: Any):
    """The measurement above can fail."""
    monkeypatch.setattr(embedded, "sample_tokens", mistake(embedded.sample_tokens))
    line = metrics_of(finished("train", "config.yaml", "rollout.temperature=0.7", "run.num_steps=1"))[0]
    assert line["train/engine_logprob_diff/max"] > 9e-4
    assert line["train/engine_logprob_diff/mean"] > 9e-4
    assert abs(line["train/ppo_kl"]) > 9e-4


def test_recomputed_and_engine_logprobs_agree(ready: Path):
    """They only differ by rounding, so the same run comes out; and the ratio of a first update is then exactly 1."""
    engine, recomputed = (
        finished("train", "config.yaml", f"algorithm.old_logprobs={who}", "trainer.updates_per_batch=2", name=who)
        for who in ("engine", "recomputed")
    )
    rows, others = ledger_of(recomputed, 1), ledger_of(engine, 1)
    for row, other in zip(rows, others, strict=True):
        assert row["token_ids"] == other["token_ids"]
        assert row["old_logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)
    first = [row for row in rows if row["update"] == 0]
    assert any(row["old_logprobs"] != row["logprobs"] for row in first)
    assert {ratio for row in first for ratio in row["ratios"]} == {1.0}
    for name in ("train/pg_loss", "train/grad_norm", "train/entropy"):
        assert metrics_of(recomputed)[0][name] == pytest.approx(metrics_of(engine)[0][name], abs=1e-4)


@pytest.mark.parametrize("dynamic_sampling", ["false", "true"])
def test_the_same_config_gives_the_same_numbers(ready: Path, dynamic_sampling: str):
    settings = [f"algorithm.dynamic_sampling={dynamic_sampling}", "rollout.group_size=2", "reward_workers=2"]
    one, two, other = (
        finished("train", "config.yaml", *settings, f"run.seed={seed}", name=name)
        for name, seed in (("one", 7), ("two", 7), ("other", 8))
    )
    assert without_timings(metrics_of(one)) == without_timings(metrics_of(two))
    assert without_timings(metrics_of(one)) != without_timings(metrics_of(other))
    for step in (1, 2, 3):
        assert ledger_of(one, step) == ledger_of(two, step)
    if dynamic_sampling == "true":
        assert sum(line["rollout/rejected_groups"] for line in metrics_of(one)) > 0
        assert all(sum(row["trained"] for row in ledger_of(one, step)) == 4 * 2 for step in (1, 2, 3))


# Learning


ALGORITHMS = ("cispo", "grpo", "dr_grpo", "glm", "dapo", "gspo", "reinforce")


@pytest.mark.parametrize(("algorithm", "dtype"), [(name, "float32") for name in ALGORITHMS] + [("cispo", "bfloat16")])
def test_every_algorithm_learns(ready: Path, algorithm: str, dtype: str):
    """Eight letters, of which one is rewarded: it must come to be most of what the policy writes."""
    make_architecture(ready / "letters", "abcdefgh")
    write_rows("prompts.jsonl", [{"prompt": text} for text in ("bc", "cd", "defg", "ee", "h")])
    run = finished(
        "train",
        write_config(
            model={"path": "letters", "random_weights": True, "dtype": dtype},
            rollout={"groups_per_step": 8, "group_size": 8, "max_new_tokens": 8},
            rewards=[{"name": "users_code:share_of_a"}],
            algorithm={"name": algorithm},
            trainer={"learning_rate": 1e-2, "updates_per_batch": 2},
            run={"num_steps": 9},
        ),
    )
    rewards = [line["rollout/reward"] for line in metrics_of(run)]
    assert rewards[0] < 0.2
    assert rewards[-1] > 0.6


# What else comes in and goes out


def test_prompts_come_from_jsonl_parquet_and_datasets_alike(ready: Path):
    rows = [json.loads(line) for line in Path("prompts.jsonl").read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), "prompts.parquet")
    datasets.Dataset.from_list(rows).save_to_disk("prompts")
    runs = [
        finished("train", "config.yaml", f"data.path={path}", "data.reference=answer", "run.num_steps=2", name=name)
        for name, path in (("jsonl", "prompts.jsonl"), ("parquet", "prompts.parquet"), ("hf", "prompts"))
    ]
    jsonl, *others = (without_timings(metrics_of(run)) for run in runs)
    assert others == [jsonl, jsonl]
    assert {row["where"].rpartition("row ")[0] for row in ledger_of(runs[2], 1)} == {"prompts "}


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
    run = gsm8k(gsm8k_base, *hooks, "rewards=[{name: mine:parts, weight: 2.0}]", "rollout.groups_per_step=4")
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


def test_a_loop_without_a_model(ready: Path):
    """Scripted engine, dry trainer, and up to two updates between sampling and training."""
    for file in Path("model").glob("*config.json"):
        if file.name != "tokenizer_config.json":
            file.unlink()
    Path("model/model.safetensors").unlink()
    Path("script.py").write_text(
        "def answer(prompt_ids, sampling):\n    return [10 + sampling.seed % 100] * (1 + sampling.seed % 7) + [1]\n"
    )
    run = finished(
        "train",
        write_config(
            engine={"name": "scripted", "script": "script:answer", "max_delay_s": 0.01},
            trainer={"name": "dry", "updates_per_batch": 2},
            rollout={"groups_per_step": 4, "group_size": 4, "max_new_tokens": 8, "max_staleness": 2},
            run={"num_steps": 8},
        ),
    )
    lines = metrics_of(run)
    staleness = [line["rollout/staleness/max"] for line in lines]
    assert staleness[0] == 0
    assert max(staleness) == 2
    for step in range(1, 9):
        rows = ledger_of(run, step)
        assert len(rows) == 16
        versions = [version for row in rows for version in row["policy_versions"] if version >= 0]
        assert step - 1 - min(versions) == staleness[step - 1]
    assert (run / "report.html").exists()


def test_checkpoints_every_so_many_steps(ready: Path):
    run = finished("train", "config.yaml", "checkpoint.every_steps=2", "run.num_steps=5")
    folders = sorted((run / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-000002", "step-000004", "step-000005"]
    heads = [AutoModelForCausalLM.from_pretrained(folder).lm_head.weight for folder in folders]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])
    again = finished("train", "config.yaml", f"model.path={folders[0]}", "run.num_steps=1", name="again")
    assert metrics_of(again)[0]["train/entropy"] == pytest.approx(metrics_of(run)[2]["train/entropy"], rel=0.1)
