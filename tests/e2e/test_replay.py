"""Every recorded step can be made again, to the last bit, and a record that was tampered with is told from one that was not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from small_runs import finished, metrics_of, set_up, sluice, workplace

NUM_STEPS = 30
REWARD = """
def any_vowel(prompt, trajectory):
    return float(any(c in "aeiouAEIOU" for c in trajectory.response))
"""
SETTINGS = (
    *("run.num_steps=30", "checkpoint.every_steps=7", "checkpoint.keep_last=null"),
    *("algorithm.name=dapo", "rewards.0.name=users_code:any_vowel", "rollout.groups_per_step=3"),
    *("trainer.updates_per_batch=4", "trainer.tokens_per_micro_batch=48", "trainer.learning_rate=1e-4"),
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of 30 steps with micro-batches, 4 updates per batch and dynamic sampling, in its workplace."""
    folder = tmp_path_factory.mktemp("replay")
    set_up(folder)
    with open(folder / "users_code.py", "a") as file:
        file.write(REWARD)
    with pytest.MonkeyPatch.context() as patch, workplace(folder, patch):
        run = finished("train", "config.yaml", *SETTINGS)
        assert sum(line["rollout/rejected_groups"] for line in metrics_of(run)) > 10, (
            "dynamic sampling had nothing to do"
        )
        yield run


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_every_step_is_identical(recorded: Path, capsys: pytest.CaptureFixture[str]):
    """From the first weights through all 30, and from a checkpoint in the middle to single ones."""
    assert sluice("replay", recorded, "--step", f"1:{NUM_STEPS}") == 0
    assert lines_of(capsys) == [f"step {step}: identical (12 samples)" for step in range(1, NUM_STEPS + 1)]
    for step in (7, 8, 20):
        assert sluice("replay", recorded, "--step", step) == 0
        assert lines_of(capsys) == [f"step {step}: identical (12 samples)"]


def edited(run: Path, step: int, column: str, edit: Any) -> Path:
    """A copy of the run in which the first trained row of a step says something else in one column."""
    copy = Path(shutil.copytree(run, run.with_name(f"edited-{column}"), dirs_exist_ok=True))
    path = copy / f"ledger/step-{step:06d}.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    row = next(row for row in rows if row["trained"])
    row[column] = edit(row[column])
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    return copy


def first_raised(values: list[float]) -> list[float]:
    """By one bit, at the first token that has a value."""
    at = next(i for i, value in enumerate(values) if value)
    return [*values[:at], values[at] * (1 + 2**-22), *values[at + 1 :]]


EDITS = {
    "advantages": (first_raised, "advantages of sample"),
    "current_logprobs": (first_raised, "current_logprobs of sample"),
    "clipped": (lambda values: [not values[-1]] * len(values), "clipped of sample"),
    "logprobs": (lambda values: [value - 0.5 * bool(value) for value in values], "old_logprobs of sample"),
    "reward": (lambda reward: 1 - reward, "advantages of sample"),
}


@pytest.mark.parametrize("column", EDITS)
def test_the_first_quantity_that_differs_is_named(recorded: Path, capsys: pytest.CaptureFixture[str], column: str):
    edit, said = EDITS[column]
    run = edited(recorded, 9, column, edit)
    assert sluice("replay", run, "--step", "8:10") == 1
    lines = lines_of(capsys)
    assert lines[0] == "step 8: identical (12 samples)"
    assert lines[1].startswith(f"step 9: {said}"), lines
    if column in ("advantages", "current_logprobs", "clipped"):  # what was found, not what the update was made from
        assert lines[2] == "step 10: identical (12 samples)"


def test_other_weights_are_told_though_all_else_is_the_same(recorded: Path, capsys: pytest.CaptureFixture[str]):
    """Only the fingerprint knows what the last update of a step did."""
    path = edited(recorded, 9, "prompt_id", str) / "ledger/step-000009.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"fingerprint": "0" * 16}), path)
    assert sluice("replay", path.parent.parent, "--step", "9") == 1
    assert lines_of(capsys)[0].startswith(
        "step 9: the weights after the step: fingerprint 0000000000000000 was recorded"
    )


def test_a_metric_that_differs_is_named(recorded: Path, capsys: pytest.CaptureFixture[str]):
    run = edited(recorded, 9, "where", str)
    lines = metrics_of(run)
    lines[8]["train/grad_norm"] += 1e-9
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sluice("replay", run, "--step", "9") == 1
    assert lines_of(capsys)[0].startswith("step 9: train/grad_norm: ")


def what_if(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[float, float]]:
    rows = [line.split() for line in lines_of(capsys) if line.startswith("train/")]
    return {name: (float(was), float(now)) for name, was, now in rows}


def test_what_another_algorithm_would_have_done(recorded: Path, capsys: pytest.CaptureFixture[str]):
    """The same samples and the same weights before; and what does not enter the loss does not change."""
    assert sluice("replay", recorded, "--step", "9", "--algorithm", "dr_grpo") == 0
    found = what_if(capsys)
    assert found["train/loss"][0] != found["train/loss"][1]
    assert found["train/first_update/ppo_kl"][0] == found["train/first_update/ppo_kl"][1]
    clipped = "algorithm.clip_high=0.0001", "algorithm.clip_low=0.0001"
    assert sluice("replay", recorded, "--step", "9", "--set", *clipped) == 0
    found = what_if(capsys)
    assert found["train/pg_clipfrac"][1] > found["train/pg_clipfrac"][0]
    assert sluice("replay", recorded, "--step", "9", "--set", "algorithm.kl_coef=0.5") == 0
    assert "train/loss" in what_if(capsys)


def test_the_cut_into_micro_batches_is_not_what_a_loss_depends_on(recorded: Path, capsys: pytest.CaptureFixture[str]):
    """Z3, on recorded data: one micro-batch or many, in rows or packed."""
    for setting in ("trainer.tokens_per_micro_batch=100000", "trainer.layout=packed"):
        assert sluice("replay", recorded, "--step", "9", "--set", setting) == 0
        for name, (was, now) in what_if(capsys).items():
            assert now == pytest.approx(was, rel=1e-3, abs=1e-6), (setting, name)


REFUSED = {
    "a step that is not there": (["--step", "99"], 2, "step 99 is not in the ledger"),
    "no step": (["--step", "0"], 2, "is no whole number from 1"),
    "a range without end": (["--step", "3:"], 2, "is no step and no range of steps"),
    "a row that is not there": (["--step", "3", "--algorithm", "daop"], 2, "algorithm.name"),
    "another model": (
        ["--step", "3", "--set", "model.dtype=bfloat16"],
        2,
        "can change the keys of algorithm. and trainer. only",
    ),
    "a critic that never was": (["--step", "3", "--algorithm", "ppo"], 2, "cannot change between advantage: gae"),
    "scores what if": (["--step", "3", "--rewards", "--algorithm", "cispo"], 2, "has no effect; leave it out"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_replayed_is_refused(recorded: Path, capsys: pytest.CaptureFixture[str], what: str):
    words, code, said = REFUSED[what]
    assert sluice("replay", recorded, *words) == code
    assert said in capsys.readouterr().err


def test_rewards_are_scored_again_and_disagreements_listed(recorded: Path, capsys: pytest.CaptureFixture[str]):
    """Rejected groups too; a reward that has changed is found in every sample that it scores otherwise."""
    assert sluice("replay", recorded, "--step", "1:5", "--rewards") == 0
    assert lines_of(capsys)[-1].startswith("0 of ")
    code = Path("users_code.py").read_text()
    Path("users_code.py").write_text(code.replace('"aeiouAEIOU"', '"aeio"'))
    try:
        assert sluice("replay", recorded, "--step", "1:5", "--rewards") == 0
    finally:
        Path("users_code.py").write_text(code)
    *found, total = lines_of(capsys)
    assert found
    assert total.startswith(f"{len(found)} of ")
    assert all("any_vowel was 1.0 and is 0.0" in line for line in found)


ENVIRONMENT = """
from sluice.types import Trajectory

async def asks_twice(prompt, policy):
    said = await policy.respond(prompt.messages)
    await policy.respond([{"role": "user", "content": f"again, after {said['content'][:2]}"}])
    policy.turns[0].reward = 0.25
    return Trajectory(policy.turns, stop_reason="done")

def turns_and_texts(prompt, trajectory):
    return len(trajectory.turns) + sum(len(turn.completion.text) for turn in trajectory.turns) / 100
"""


@pytest.mark.parametrize(
    "settings",
    [
        ("algorithm.name=ppo", "critic.pretrain_steps=1"),
        ("algorithm.name=grpo", "algorithm.kl_coef=0.1", "reference.update_every_steps=2"),
        ("rollout.top_p=0.8", "algorithm.old_logprobs=recomputed", "algorithm.correction=tis"),
        ("rollout.environment=conversation:asks_twice", "rewards=[{name: 'conversation:turns_and_texts'}]"),
        ("model.dtype=bfloat16",),
    ],
)
def test_other_kinds_of_runs_are_identical_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], settings: tuple[str, ...]
):
    set_up(tmp_path)
    (tmp_path / "conversation.py").write_text(ENVIRONMENT)
    with workplace(tmp_path, monkeypatch):
        run = finished("train", "config.yaml", "run.num_steps=4", "checkpoint.every_steps=2", *settings)
        capsys.readouterr()
        assert sluice("replay", run, "--step", "1:4") == 0, lines_of(capsys)
        assert sluice("replay", run, "--step", "4") == 0
        assert all("identical" in line for line in lines_of(capsys))
        assert sluice("replay", run, "--step", "1:4", "--rewards") == 0
        assert lines_of(capsys)[-1] == "0 of 64 scores are other than recorded"
