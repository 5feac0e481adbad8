"""An engine in a process of its own: the same run as in the trainer's process, with bounded staleness beside it, and through kill -9."""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from processes import engines
from sluice import connection
from sluice.engines.serving import Begin, Fingerprint, Generate, Update
from sluice.launch import models
from sluice.viewer import report
from small_runs import events_of, finished, ledger_of, metrics_of, set_up, sluice, without_timings, workplace

APART = ("engine.process=own", "engine.num_threads=1")


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(report, "write_report", lambda run: None)
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        yield tmp_path


def rows_of(run: Path, steps: int) -> list[dict[str, Any]]:
    return [row for step in range(1, steps + 1) for row in ledger_of(run, step)]


def ages(row: dict[str, Any], step: int) -> set[int]:
    """How many updates before its own each sampled token of a row of the step's ledger was made."""
    return {step - 1 - version for version in row["policy_versions"] if version >= 0}


def test_without_staleness_it_is_the_same_run_to_the_last_bit(ready: Path):
    """Z10. Every column of the ledger and every metric, over 20 steps."""
    words = ("train", "config.yaml", "run.num_steps=20")
    inside, apart = finished(*words), finished(*words, *APART, name="apart")
    assert rows_of(inside, 20) == rows_of(apart, 20)
    assert without_timings(metrics_of(inside)) == without_timings(metrics_of(apart))
    assert not engines()


def test_it_is_given_what_adapters_make_of_the_weights(ready: Path):
    """The same samples as inside, where prompts go through the adapters themselves; that it has the trainer's weights is a check."""
    words = ("train", "config.yaml", "run.num_steps=3", "trainer.lora_rank=4", "trainer.learning_rate=1e-2")
    inside, apart = finished(*words), finished(*words, *APART, name="apart")
    ids = [[row["token_ids"] for row in rows_of(run, 3)] for run in (inside, apart)]
    assert ids[0] == ids[1]
    assert metrics_of(apart)[-1]["train/grad_norm"] > 0


WAYS = {1: "broadcast", 2: "disk", 4: "shared_memory"}


@pytest.mark.parametrize(
    ("staleness", "on_new_weights"),
    [
        *((1, "continue"), (2, "finish"), (4, "continue")),
        *(pytest.param(*case, marks=pytest.mark.proof) for case in ((1, "finish"), (2, "continue"), (4, "finish"))),
    ],
)
def test_staleness_is_bounded_and_each_token_has_its_version(ready: Path, staleness: int, on_new_weights: str):
    """Z11: with filtering, uneven lengths and environments that take their time; the check of the run itself is on."""
    (ready / "slow.py").write_text(
        "import asyncio, random\n"
        "from sluice.environments.single_turn import single_turn\n\n\n"
        "async def dawdling(prompt, policy):\n"
        "    await asyncio.sleep(random.random() / 20)\n"
        "    return await single_turn(prompt, policy)\n\n\n"
        "def some(group):\n"
        "    return hash(group.prompt.id) % 5 > 0\n"
    )
    run = finished(
        "train",
        "config.yaml",
        *APART,
        f"rollout.max_staleness={staleness}",
        f"engine.on_new_weights={on_new_weights}",
        f"engine.publication={WAYS[staleness]}",
        "rollout.environment=slow:dawdling",
        "rollout.filter=slow:some",
        "rollout.max_new_tokens=60",
        "run.num_steps=8",
    )
    found = {step: [ages(row, step) for row in ledger_of(run, step) if row["trained"]] for step in range(1, 9)}
    assert all(max(age) <= staleness for rows in found.values() for age in rows)
    assert any(max(age) > 0 for rows in found.values() for age in rows), "nothing was sampled ahead"
    mixed = any(len(age) > 1 for rows in found.values() for age in rows)
    assert mixed == (on_new_weights == "continue")
    assert max(line["rollout/staleness/max"] for line in metrics_of(run)) <= staleness


def test_log_probs_are_those_of_the_weights_that_each_token_names(ready: Path):
    """By the checkpoint of that version, for every sample that one version made, however old it was when it was trained."""
    run = finished(
        "train",
        "config.yaml",
        *APART,
        "engine.on_new_weights=finish",
        "rollout.max_staleness=2",
        "run.num_steps=5",
        "trainer.learning_rate=0.02",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=null",
    )
    seen: Counter[int] = Counter()
    for step in range(1, 6):
        for row in ledger_of(run, step):
            (version,) = {version for version in row["policy_versions"] if version >= 0}
            folder = run / f"checkpoints/step-{version:06d}" if version else Path("model")
            model = AutoModelForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                logp = model(torch.tensor([row["token_ids"]])).logits[0].log_softmax(-1)
            for t, weight in enumerate(row["loss_weights"]):
                if weight:
                    assert abs(float(logp[t - 1, row["token_ids"][t]]) - row["logprobs"][t]) < 1e-4
            seen[step - 1 - version] += 1
    assert len(seen) > 1, "nothing was sampled ahead"


INSTANTS = {
    "starting": Begin,
    "decoding": Generate,
    "taking over weights": Update,
    "asked for a fingerprint": Fingerprint,
}
DIFFERENTLY = {
    ("starting", 0): "disk",
    ("starting", 2): "broadcast",
    ("decoding", 0): "broadcast",
    ("taking over weights", 2): "broadcast",
    ("asked for a fingerprint", 0): "broadcast",
    ("asked for a fingerprint", 2): "disk",
}
"""How weights are published where it is not through shared memory."""
SLOW = {
    *(
        ("taking over weights", 0),
        ("taking over weights", 2),
        ("asked for a fingerprint", 0),
        ("asked for a fingerprint", 2),
    ),
    *(("decoding", 0), ("decoding", 2), ("starting", 2)),
}
"""Up to a minute each."""


def kill_when(monkeypatch: pytest.MonkeyPatch, kind: type, times: Container[int] = ()) -> list[int]:
    """kill -9 of the engine's process when it is sent such a message, every other time or those times; while it decodes, a moment
    later."""
    send, sent = connection.write, count(1)
    killed: list[int] = []

    def kill() -> None:
        for pid in engines():
            killed.append(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def watched(writer: Any, message: Any) -> None:
        send(writer, message)
        if not isinstance(message, kind):
            return
        number = next(sent)
        if number in times if times else number % 2 == (kind is Begin):
            threading.Timer(0.03, kill).start() if kind is Generate else kill()

    monkeypatch.setattr(connection, "write", watched)
    return killed


@pytest.mark.parametrize(
    ("instant", "staleness"),
    [
        pytest.param(instant, staleness, marks=pytest.mark.proof if (instant, staleness) in SLOW else ())
        for instant in INSTANTS
        for staleness in (0, 2)
    ],
)
def test_a_killed_engine_costs_no_sample(ready: Path, instant: str, staleness: int, monkeypatch: pytest.MonkeyPatch):
    """Nothing is lost, nothing is trained twice; and without staleness it is the run without kills."""
    steps = ("run.num_steps=6", "rollout.max_new_tokens=40", "trainer.learning_rate=1e-4")
    way = f"engine.publication={DIFFERENTLY.get((instant, staleness), 'shared_memory')}"
    options = (*APART, *steps, way, "engine.max_restarts=20", f"rollout.max_staleness={staleness}")
    with monkeypatch.context() as patch:
        killed = kill_when(patch, INSTANTS[instant])
        run = finished("train", "config.yaml", *options)
    assert killed
    died = [event for event in events_of(run) if event["kind"] == "engine_died"]
    assert 0 < sum(line["perf/lost_engines"] for line in metrics_of(run)) <= len(died)
    assert len(died) in (len(killed), len(killed) - 1)  # of one that has answered before it died, nobody may ask again
    rows = [row for row in rows_of(run, 6) if row["trained"]]
    assert Counter((row["group"], row["index"]) for row in rows) == Counter(
        {(group, index): 1 for group in range(24) for index in range(4)}
    )
    if staleness:
        return
    whole = rows_of(finished("train", "config.yaml", *steps, name="whole"), 6)
    assert [row["token_ids"] for row in rows] == [row["token_ids"] for row in whole]
    if instant != "decoding":  # what is decoded side by side decides the last bit
        assert rows == whole
    assert not engines()


def test_one_that_dies_too_often_ends_the_run(ready: Path, capsys: pytest.CaptureFixture[str]):
    (ready / "dying.py").write_text(
        "import os\n"
        "if 'serving' in ' '.join(open(f'/proc/{os.getpid()}/cmdline').read().split(chr(0))):\n"
        "    print('no luck', flush=True)\n"
        "    os._exit(3)\n"
    )
    (ready / "sitecustomize.py").write_text("import dying\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ready))
        assert (
            sluice("train", "config.yaml", *APART, "engine.max_restarts=1", "run.name=test", "run.num_threads=1") == 1
        )
    said = capsys.readouterr().err
    assert "the engine died 2 times (limit: engine.max_restarts)" in said
    assert "engine.log" in said


PLANTED = """
from sluice.launch.models import engine_apart


def forgetful(config):
    engine = engine_apart(config)
    update = engine.update_weights

    async def with_version_1(weights, version):
        if version == 1:
            engine.kept = [weight.detach().clone() for _, weight in engine.model.named_weights()]
        for (_, weight), kept in zip(engine.model.named_weights(), engine.kept if version == 2 else ()):
            weight.data.copy_(kept)
        return await update(weights, version)

    engine.update_weights = with_version_1
    return engine
"""


@pytest.mark.parametrize("publication", ["shared_memory", "broadcast", "disk"])
def test_an_engine_with_stale_weights_is_caught_at_the_next_publication(
    ready: Path, publication: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Z6. Planted: it loses what was published after step 2, and says that it has it."""
    (ready / "planted.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(str(ready))
    monkeypatch.setattr(models, "engine_apart", importlib.import_module("planted").forgetful)
    words = (*APART, f"engine.publication={publication}", "run.name=test", "run.num_threads=1")
    assert sluice("train", "config.yaml", *words) == 1
    assert "weights_match, step 2" in capsys.readouterr().err
    assert [event["kind"] for event in events_of(Path("runs/test"))].count("check") == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["rollout.max_staleness=1"], "set engine.process=own"),
        (["engine.num_threads=1"], "has no effect with engine.process=trainer"),
        (["engine.on_new_weights=finish"], "has no effect with engine.process=trainer"),
        (["engine.publication=disk"], "has no effect with engine.process=trainer"),
        (["engine.process=own", "engine.publication_folder=x"], "has no effect without engine.publication=disk"),
        (["engine.process=own", "engine.on_new_weights=finish"], "has no effect with rollout.max_staleness=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(ready: Path, words: Sequence[str], complaint: str, capsys):
    assert sluice("train", "config.yaml", *words) != 0
    assert complaint in capsys.readouterr().err
