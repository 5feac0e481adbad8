"""Completions that were unfinished when a checkpoint was written go on in the run that is resumed from it, within the bound on staleness."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine_process import APART, ages, kill_when
from transformers import AutoModelForCausalLM

from sluice.engines.serving import Generate
from sluice.viewer import report
from small_runs import events_of, finished, ledger_of, set_up, sluice, started, workplace

EVERY = ("checkpoint.every_steps=1", "checkpoint.keep_last=null")
LONG = ("rollout.max_new_tokens=200", "rollout.max_staleness=1")


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(report, "write_report", lambda run: None)
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        yield tmp_path


def as_killed_after(run: Path, step: int) -> Path:
    """A copy of a run folder as if the process had been killed before it wrote another checkpoint."""
    killed = Path(shutil.copytree(run, "runs/killed"))
    for folder in (killed / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return killed


def calls_of(run: Path, step: int) -> list[dict[str, Any]]:
    state = json.loads((run / f"checkpoints/step-{step:06d}/run_state.json").read_text())
    return [*state["buffer"]["calls"].values()]


def continued(calls: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each call of a checkpoint with the row of the ledger that goes on from its tokens, under the same versions and log-probs."""
    pairs = []
    for call in calls:
        made, start = call["made"], len(call["prompt_ids"])
        end = start + len(made["token_ids"])
        pairs += [
            (call, row)
            for row in rows
            if row["group"] == call["ticket"]
            and row["token_ids"][:end] == call["prompt_ids"] + made["token_ids"]
            and row["policy_versions"][start:end] == made["policy_versions"]
            and row["logprobs"][start:end] == pytest.approx(made["logprobs"], abs=1e-6)
        ]
    return pairs


def test_unfinished_completions_go_on_after_a_resume(ready: Path):
    """R8. None is thrown away, and every token's log-prob is by the weights that it names: those of the checkpoint for what comes."""
    exact = (*APART, *EVERY, *LONG, "engine.on_new_weights=finish", "trainer.learning_rate=0.02")
    whole = finished("train", "config.yaml", *exact, "run.num_steps=4", name="whole")
    killed = as_killed_after(whole, 2)
    calls = calls_of(killed, 2)
    half = [call for call in calls if not call["is_finished"]]
    assert half, "nothing was unfinished"
    assert sluice("train", "--resume", killed) == 0
    rows = [row for step in (3, 4) for row in ledger_of(killed, step)]
    pairs = continued(calls, rows)
    assert len(pairs) == len(calls)
    assert any(len(row["token_ids"]) > len(call["prompt_ids"] + call["made"]["token_ids"]) for call, row in pairs)
    for call, row in continued(half, rows)[:4]:
        (version,) = {version for version in row["policy_versions"] if version >= 0}
        assert version == 2
        model = AutoModelForCausalLM.from_pretrained(killed / "checkpoints/step-000002")
        with torch.no_grad():
            logp = model(torch.tensor([row["token_ids"]])).logits[0].log_softmax(-1)
        for t in range(len(call["prompt_ids"]), len(row["token_ids"])):
            assert abs(float(logp[t - 1, row["token_ids"][t]]) - row["logprobs"][t]) < 1e-4


def test_what_is_begun_again_and_again_keeps_the_versions_of_its_tokens(ready: Path):
    """Weights change under it, it is in a checkpoint, and the run goes on from there with the next weights."""
    whole = finished("train", "config.yaml", *APART, *EVERY, *LONG, "run.num_steps=5", name="whole")
    killed = as_killed_after(whole, 3)
    calls = calls_of(killed, 3)
    assert sluice("train", "--resume", killed) == 0
    rows = [row for step in (4, 5) for row in ledger_of(killed, step)]
    assert len(continued(calls, rows)) == len(calls) > 0
    for step in (4, 5):
        assert all(max(ages(row, step)) <= 1 for row in ledger_of(killed, step) if row["trained"])
    assert sluice("replay", killed, "--step", "4:5") == 0


def test_a_run_that_is_asked_to_leave_takes_with_it_what_is_unfinished(ready: Path):
    process = started("train", "config.yaml", *APART, *LONG, "run.name=left", "run.num_steps=500", cwd=ready)
    run, limit = Path("runs/left"), time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 2:
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    (folder,) = (run / "checkpoints").iterdir()
    step = int(folder.name.removeprefix("step-"))
    calls = calls_of(run, step)
    assert any(not call["is_finished"] for call in calls)
    assert sluice("train", "--resume", run, f"run.num_steps={step + 2}") == 0
    rows = [row for after in (1, 2) for row in ledger_of(run, step + after)]
    assert len(continued(calls, rows)) == len(calls)


@pytest.mark.parametrize(
    "staleness", [2, pytest.param(1, marks=pytest.mark.proof), pytest.param(4, marks=pytest.mark.proof)]
)
def test_the_bound_holds_through_dead_engines_and_a_resume(
    ready: Path, staleness: int, monkeypatch: pytest.MonkeyPatch
):
    """Z11: under random delays and a filter, by the check of the run and by its ledger; each group is trained once, in order."""
    (ready / "slow.py").write_text(
        "import asyncio, random\n"
        "from sluice.environments.single_turn import single_turn\n\n\n"
        "async def dawdling(prompt, policy):\n"
        "    await asyncio.sleep(random.random() / 20)\n"
        "    return await single_turn(prompt, policy)\n\n\n"
        "def some(group):\n"
        "    return int(group.prompt.id.rpartition('-')[2]) % 5 > 0\n"
    )
    words = (
        *(*APART, *EVERY, f"rollout.max_staleness={staleness}", "engine.publication=broadcast"),
        *("rollout.environment=slow:dawdling", "rollout.filter=slow:some", "rollout.max_new_tokens=100"),
        *("run.num_steps=7", "engine.max_restarts=2"),
    )
    with monkeypatch.context() as patch:
        killed = kill_when(patch, Generate, times=(9,))
        whole = finished("train", "config.yaml", *words, name="whole")
    assert killed
    assert [event["kind"] for event in events_of(whole)].count("engine_died") == 1
    again = as_killed_after(whole, 4)
    assert sluice("train", "--resume", again) == 0
    for run in (whole, again):
        trained = {step: [row for row in ledger_of(run, step) if row["trained"]] for step in range(1, 8)}
        found = {step: max(max(ages(row, step)) for row in rows) for step, rows in trained.items()}
        assert max(found.values()) <= staleness
        assert any(found.values()), "nothing was sampled ahead"
        groups = [row["group"] for rows in trained.values() for row in rows]
        assert groups == sorted(groups)
        assert set(Counter(groups).values()) == {4}
        assert not [event for event in events_of(run) if event["kind"] == "check"]
