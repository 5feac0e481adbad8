"""Small runs through `sluice train`: engine and trainer agree, runs repeat, every algorithm learns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from sluice.config import TrainConfig
from sluice.configfile import load
from sluice.engines import embedded
from sluice.viewer import report
from small_runs import (
    events_of,
    finished,
    ledger_of,
    make_architecture,
    make_model,
    metrics_of,
    set_up,
    without_timings,
    workplace,
    write_config,
    write_rows,
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder as the current one."""
    with workplace(tmp_path, monkeypatch):
        yield tmp_path


@pytest.fixture
def ready(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with everything for `sluice train config.yaml`; without report.html, which takes most of a short run."""
    monkeypatch.setattr(report, "write_report", lambda run: None)
    set_up(here)
    return here


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
def test_engine_and_trainer_give_one_logprob(ready: Path, architecture: str, layout: str, updates: int):
    make_model("model", architecture)
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
        assert line["train/grad_norm"] > 0  # the weights do move between the steps
        assert line["train/engine_logprob_diff/max"] < 1e-4
        assert line["train/engine_prob_diff/mean"] < 1e-5
        assert line["train/engine_prob_corr"] > 0.99999
        assert abs(line["train/first_update/ppo_kl"]) < 1e-5
        assert line["train/first_update/pg_clipfrac"] == 0
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


@pytest.mark.parametrize("old_logprobs", ["engine", "recomputed"])
@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_engine_and_trainer_give_one_logprob_with_top_p(ready: Path, layout: str, old_logprobs: str):
    """R2 with truncation: both speak of what was drawn from, and the ratio of a first update is 1."""
    run = finished(
        "train",
        "config.yaml",
        f"trainer.layout={layout}",
        "trainer.updates_per_batch=2",
        "trainer.tokens_per_micro_batch=64",
        "rollout.temperature=0.7",
        "rollout.top_p=0.8",
        f"algorithm.old_logprobs={old_logprobs}",
    )
    if old_logprobs == "engine":
        assert_agreement(run, 2)
    assert all(abs(line["train/first_update/ppo_kl"]) < 1e-5 for line in metrics_of(run))
    own = [
        (token, kept)
        for row in ledger_of(run, 1)
        for token, kept, weight in zip(row["token_ids"], row["kept_ids"], row["loss_weights"], strict=True)
        if weight
    ]
    assert all(token in kept for token, kept in own)
    assert 1 < max(len(kept) for _, kept in own) < 128


def _offset(sample: Any) -> Any:
    """An engine whose log-probs are off by a thousandth."""
    return lambda *args, **more: ((drawn := sample(*args, **more))[0], drawn[1] + 1e-3, drawn[2])


def _untempered(sample: Any) -> Any:
    """An engine that samples at the temperature and forgets it in its log-probs."""

    def forgetful(logits: torch.Tensor, *rest: Any, **more: Any) -> Any:
        tokens, _, kept = sample(logits, *rest, **more)
        logp = torch.log_softmax(logits.masked_fill(~kept, -torch.inf), -1)
        return tokens, logp.gather(1, tokens[:, None])[:, 0], kept

    return forgetful


def _unreported(sample: Any) -> Any:
    """An engine that keeps to itself what top-p dropped."""
    return lambda *args, **more: (*sample(*args, **more)[:2], None)


@pytest.mark.parametrize("mistake", [_offset, _untempered, _unreported])
def test_a_mistake_of_the_engine_shows(ready: Path, monkeypatch: pytest.MonkeyPatch, mistake: Any):
    """The measurement above can fail, and the check that looks at it tells."""
    monkeypatch.setattr(embedded, "sample_tokens", mistake(embedded.sample_tokens))
    settings = ["rollout.temperature=0.7", "rollout.top_p=0.8", "run.num_steps=1", "checks.first_update_ratio=warn"]
    run = finished("train", "config.yaml", *settings)
    assert [event["details"]["check"] for event in events_of(run)] == ["first_update_ratio"]
    line = metrics_of(run)[0]
    assert line["train/engine_logprob_diff/max"] > 9e-4
    assert line["train/engine_logprob_diff/mean"] > 9e-4
    assert abs(line["train/first_update/ppo_kl"]) > 9e-4


@pytest.mark.parametrize("settings", [["trainer.activation_checkpointing=true"], ["engine.cache_gb=1e-4"]])
def test_what_saves_memory_changes_nothing(ready: Path, settings: list[str]):
    """Activations that are computed again are the same to the last bit, and so is a first step sampled a few at a time."""
    plain, saving = (
        finished("train", "config.yaml", name="plain"),
        finished("train", "config.yaml", *settings, name="saving"),
    )
    first, other = ledger_of(plain, 1), ledger_of(saving, 1)
    assert [row["token_ids"] for row in first] == [row["token_ids"] for row in other]
    if "trainer" in settings[0]:
        names = ("train/loss", "train/grad_norm")
        assert [[m[n] for n in names] for m in metrics_of(plain)] == [[m[n] for n in names] for m in metrics_of(saving)]


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


@pytest.mark.parametrize("settings", [(), ("algorithm.dynamic_sampling=true", "rollout.group_size=2")])
def test_the_same_config_gives_the_same_numbers(ready: Path, settings: tuple[str, ...]):
    """To the last bit, whenever rewards arrive; with dynamic sampling too, where they make room for other prompts."""
    one, two, other = (
        finished("train", "config.yaml", "reward_workers=2", *settings, f"run.seed={seed}", name=name)
        for name, seed in (("one", 7), ("two", 7), ("other", 8))
    )
    assert without_timings(metrics_of(one)) == without_timings(metrics_of(two))
    assert without_timings(metrics_of(one)) != without_timings(metrics_of(other))
    for step in (1, 2, 3):
        assert ledger_of(one, step) == ledger_of(two, step)
    if settings:
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


def test_checkpoints_every_so_many_steps(ready: Path):
    run = finished("train", "config.yaml", "checkpoint.every_steps=2", "run.num_steps=5")
    folders = sorted((run / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-000002", "step-000004", "step-000005"]
    heads = [AutoModelForCausalLM.from_pretrained(folder).lm_head.weight for folder in folders]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])
    again = finished("train", "config.yaml", f"model.path={folders[0]}", "run.num_steps=1", name="again")
    assert metrics_of(again)[0]["train/entropy"] == pytest.approx(metrics_of(run)[2]["train/entropy"], rel=0.1)
