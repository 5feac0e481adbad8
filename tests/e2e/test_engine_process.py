"""An engine in a process of its own: the same run as in the trainer's process, with bounded staleness beside it, and through kill -9."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from sluice.engines import process as engine_process
from sluice.engines.serving import Update
from sluice.viewer import report
from small_runs import events_of, finished, ledger_of, metrics_of, set_up, sluice, without_timings, workplace

APART = ("engine.process=own", "engine.num_threads=1")


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(report, "write_report", lambda run: None)
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        yield tmp_path


def children() -> list[int]:
    """Engine processes of this one."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            pids = map(int, (task / "children").read_text().split())
            found += [pid for pid in pids if b"sluice.engines.serving" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


def rows_of(run: Path, steps: int) -> list[dict[str, Any]]:
    return [row for step in range(1, steps + 1) for row in ledger_of(run, step)]


def ages(row: dict[str, Any], step: int) -> set[int]:
    """How many updates before its own each sampled token of a row of the step's ledger was made."""
    return {step - 1 - version for version in row["policy_versions"] if version >= 0}


def test_without_staleness_it_is_the_same_run_to_the_last_bit(ready: Path):
    """Z10. Every column of the ledger and every metric, over 20 steps."""
    steps = "run.num_steps=20"
    inside, apart = (
        finished("train", "config.yaml", steps),
        finished("train", "config.yaml", steps, *APART, name="apart"),
    )
    assert rows_of(inside, 20) == rows_of(apart, 20)
    assert without_timings(metrics_of(inside)) == without_timings(metrics_of(apart))
    assert not children()


@pytest.mark.parametrize("on_new_weights", ["continue", "finish"])
@pytest.mark.parametrize("staleness", [1, 2, 4])
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


def test_log_probs_are_those_of_each_tokens_own_weights(ready: Path):
    """Tokens of a group that was sampled by one version have the log-probs that the trainer found with those weights."""
    run = finished(
        "train", "config.yaml", *APART, "rollout.max_staleness=1", "run.num_steps=6", "trainer.learning_rate=0.05"
    )
    for step in range(1, 7):
        for row in ledger_of(run, step):
            if row["trained"] and ages(row, step) == {0}:
                differences = [
                    abs(a - b) for a, b, w in zip(row["logprobs"], row["current_logprobs"], row["loss_weights"]) if w
                ]
                assert max(differences) < 1e-4


@contextmanager
def killing(num: int) -> Iterator[list[int]]:
    """kill -9 of the engine's process, `num` times at random instants."""
    done: list[int] = []
    over = threading.Event()

    def work() -> None:
        drawn = random.Random(num)
        while len(done) < num and not over.wait(drawn.uniform(0.2, 1.0)):
            for pid in children():
                if pid not in done and Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)
                    done.append(pid)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_killed_engine_costs_no_sample(ready: Path, staleness: int):
    """Nothing is lost, nothing is trained twice; and without staleness the run is the one without kills, to the last bit."""
    options = (
        *APART,
        "engine.max_restarts=20",
        "rollout.engine_retries=20",
        "run.num_steps=12",
        f"rollout.max_staleness={staleness}",
    )
    with killing(3) as killed:
        run = finished("train", "config.yaml", *options)
    assert len(killed) == 3
    rows = [row for row in rows_of(run, 12) if row["trained"]]
    counted = Counter((row["group"], row["index"]) for row in rows)
    assert set(counted) == {(group, index) for group in range(48) for index in range(4)}
    assert set(counted.values()) == {1}
    if not staleness:
        whole = finished("train", "config.yaml", "run.num_steps=12", name="whole")
        assert rows_of(run, 12) == rows_of(whole, 12)
    assert not children()


def test_one_that_dies_too_often_ends_the_run(ready: Path, capsys: pytest.CaptureFixture[str]):
    (ready / "dying.py").write_text(
        "import os\nif 'serving' in ' '.join(open(f'/proc/{os.getpid()}/cmdline').read().split(chr(0))): os._exit(3)\n"
    )
    (ready / "sitecustomize.py").write_text("import dying\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ready))
        assert (
            sluice("train", "config.yaml", *APART, "engine.max_restarts=1", "run.name=test", "run.num_threads=1") == 1
        )
    said = capsys.readouterr().err
    assert "engine's process died 2 times (limit: engine.max_restarts)" in said
    assert "engine.log" in said


def test_an_engine_with_stale_weights_is_caught_at_the_next_publication(
    ready: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Z6. Planted: it is never told of new weights, and says that it has them."""
    ask = engine_process.EngineProcess._ask

    async def forgetful(self: Any, message: Any, limit_s: float | None = None) -> Any:
        return None if isinstance(message, Update) and message.version == 2 else await ask(self, message, limit_s)

    monkeypatch.setattr(engine_process.EngineProcess, "_ask", forgetful)
    assert sluice("train", "config.yaml", *APART, "run.name=test", "run.num_threads=1") == 1
    assert "weights_match" in capsys.readouterr().err
    assert [event["kind"] for event in events_of(Path("runs/test"))].count("check") >= 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["rollout.max_staleness=1"], "set engine.process=own"),
        (["engine.num_threads=1"], "has no effect with engine.process=trainer"),
        (["engine.on_new_weights=finish"], "has no effect with engine.process=trainer"),
        (["engine.process=own", "engine.on_new_weights=finish"], "has no effect with rollout.max_staleness=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(ready: Path, words: Sequence[str], complaint: str, capsys):
    assert sluice("train", "config.yaml", *words) != 0
    assert complaint in capsys.readouterr().err
