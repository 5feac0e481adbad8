"""Ctrl-C and kill -9 in the middle of a run: real processes, real signals, and what is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from small_runs import events_of, ledger_of, metrics_of, set_up, started

STARTED_WITHIN_S = 90
RUN = Path("runs/test")


@contextmanager
def running(folder: Path, begun: Callable[[], bool], *settings: str) -> Iterator[subprocess.Popen[str]]:
    """`sluice train` of a run without end, as a process, once it has `begun`."""
    words = ["run.name=test", "run.num_steps=100000", "checkpoint.every_steps=1", "reward_workers=2", *settings]
    process = started("train", "config.yaml", *words, cwd=folder)
    try:
        wait_until(lambda: process.poll() is not None or begun(), STARTED_WITHIN_S)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


def two_steps(folder: Path) -> Callable[[], bool]:
    path = folder / RUN / "metrics.jsonl"
    return lambda: path.exists() and path.read_text().count("\n") >= 2


def wait_until(true: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, f"not within {limit_s} s"
        time.sleep(0.02)


def reward_processes_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for task in Path(f"/proc/{process.pid}/task").iterdir():  # started by threads
        with suppress(FileNotFoundError):
            children += (task / "children").read_text().split()
    return sorted({int(child) for child in children})


def is_alive(pid: int) -> bool:
    """Not gone, and no zombie either."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def check_record(run: Path) -> int:
    """Every metric line and ledger file is whole, and every checkpoint loads; gives the number of steps."""
    steps = [line["step"] for line in metrics_of(run)]
    assert steps == list(range(1, len(steps) + 1))
    ledgers = sorted(path.name for path in (run / "ledger").glob("*.parquet"))
    assert len(ledgers) - len(steps) in (0, 1)  # a step's ledger comes before its line
    for step in range(1, len(ledgers) + 1):
        assert len(ledger_of(run, step)) == 4 * 4
    whole = sorted(path for path in (run / "checkpoints").iterdir() if not path.name.endswith(".partial"))
    assert len(steps) - len(whole) in (0, 1)  # and its checkpoint after
    for folder in (whole[0], whole[-1]):
        AutoModelForCausalLM.from_pretrained(folder)
    unknown = {path.name for path in (run / "checkpoints").iterdir()} - {path.name for path in whole}
    assert all(name.startswith(".step-") for name in unknown)
    return len(steps)


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    set_up(tmp_path)
    return tmp_path


def test_ctrl_c_ends_a_run_in_order(ready: Path):
    with running(ready, two_steps(ready)) as process:
        rewards = reward_processes_of(process)
        assert len([pid for pid in rewards if is_alive(pid)]) == 2
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert error == "interrupted; what was written until now is whole\n"
    assert "Traceback" not in output
    steps = check_record(ready / RUN)
    assert not list((ready / RUN).rglob("*.partial"))
    assert steps >= 2
    assert events_of(ready / RUN)[-1]["kind"] == "stopped"
    assert "KeyboardInterrupt" in events_of(ready / RUN)[-1]["message"]
    assert (ready / RUN / "report.html").stat().st_size > 10_000
    assert not [pid for pid in rewards if is_alive(pid)]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_reward_that_hangs_holds_nothing_up(ready: Path, sent: signal.Signals):
    (ready / "stuck.py").write_text(
        "import time\ndef f(prompt, trajectory):\n    open('begun', 'w')\n    time.sleep(600)\n"
    )
    rewards = "rewards=[{name: stuck:f, timeout_s: 600}]"
    with running(ready, (ready / "begun").exists, rewards) as process:
        children = reward_processes_of(process)
        assert any(map(is_alive, children))
        process.send_signal(sent)
        _, error = process.communicate(timeout=20)
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert error == "interrupted; what was written until now is whole\n"
    wait_until(lambda: not any(map(is_alive, children)), 5)


def test_kill_9_leaves_whole_files_and_no_orphans(ready: Path):
    with running(ready, two_steps(ready)) as process:
        rewards = reward_processes_of(process)
        assert len([pid for pid in rewards if is_alive(pid)]) == 2
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)
    wait_until(lambda: not any(map(is_alive, rewards)), 5)
    assert process.returncode == -signal.SIGKILL
    assert check_record(ready / RUN) >= 2


def test_ctrl_c_ends_supervised_fine_tuning_too(tmp_path: Path) -> None:
    """None of its awaits would otherwise ever let the cancellation in."""
    set_up(tmp_path)
    (tmp_path / "sft.jsonl").write_text('{"prompt": "a", "response": "ab"}\n' * 64)
    words = ["model.path=model", "data.path=sft.jsonl", "run.num_epochs=100000", "run.name=test", "run.num_threads=1"]
    process = started("sft", *words, cwd=tmp_path)
    try:
        wait_until(lambda: process.poll() is not None or two_steps(tmp_path)(), STARTED_WITHIN_S)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "Traceback" not in said
