"""A full disk is waited for, within a limit, and costs nothing: neither a sample nor a step nor a checkpoint."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from disks import fill, small
from models import tiny_model
from same import assert_same_runs
from sluice.weights.fingerprint import fingerprint
from small_runs import events_of, finished, set_up, sluice, started, workplace

NUM_STEPS = 6


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of 8 MiB at runs/, in a workplace."""
    set_up(tmp_path)
    with small(tmp_path / "runs", "8m") as disk, workplace(tmp_path, monkeypatch):
        yield disk


def train_until_full(
    disk: Path, wait_s: float, every: int, *words: str
) -> tuple[subprocess.Popen[str], list[str], Path]:
    """Start a run, fill its disk after the second step, and come back when it says that it waits."""
    settings = (f"run.disk_wait_s={wait_s}", f"checkpoint.every_steps={every}", f"run.num_steps={NUM_STEPS}")
    process = started("train", "config.yaml", "run.name=full", "run.num_threads=1", *settings, *words)
    guard = threading.Timer(180, process.kill)
    guard.start()
    said: list[str] = []
    ballast = disk / "ballast"
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if line.strip().startswith("2/"):
            fill(disk)
        if line.startswith("disk_full"):
            break
    guard.cancel()
    assert said[-1].startswith("disk_full"), [said, process.communicate()]
    return process, said, ballast


RANKS = ("engine.process=own", "engine.num_threads=1", "trainer.name=fsdp", "trainer.num_ranks=2")


@pytest.mark.parametrize(
    ("every", "words"),
    [
        (1, ()),
        pytest.param(1000, (), id="ledger", marks=pytest.mark.proof),
        pytest.param(1, RANKS, id="ranks", marks=pytest.mark.proof),
    ],
)
def test_room_that_is_made_in_time_is_all_that_it_needs(small_disk: Path, every: int, words: tuple[str, ...]):
    process, _, ballast = train_until_full(small_disk, 60, every, *words)
    ballast.unlink()
    _, error = process.communicate(timeout=60)
    complaints = [line for line in error.splitlines() if not line.startswith("warning: ")]  # of cores: there are two
    assert (process.returncode, complaints) == (0, [])
    full = [event["message"] for event in events_of(small_disk / "full") if event["kind"] == "disk_full"]
    assert full, "what could not be written while the disk was full is written later"
    assert "waits for room on the disk, for at most 60 s (run.disk_wait_s)" in full[0]
    whole = finished(
        "train", "config.yaml", f"run.num_steps={NUM_STEPS}", f"checkpoint.every_steps={every}", *words, name="whole"
    )
    assert_same_runs(whole, small_disk / "full", NUM_STEPS)


def test_weights_that_found_no_room_are_all_there_when_they_are_written_again(tmp_path: Path):
    """Their files come last: a second try that had none to write would end as a checkpoint without weights."""
    model = tiny_model("qwen3")
    write = model.export()
    with small(tmp_path / "disk", "64k") as disk, pytest.raises(Exception, match="No space left on device"):
        write(str(disk))
    write(str(tmp_path / "room"))
    other = tiny_model("qwen3", seed=1)
    other.load_weights(str(tmp_path / "room"))
    assert fingerprint(other.named_weights()) == fingerprint(model.named_weights())


def test_when_nobody_makes_room_it_ends_and_can_be_resumed(small_disk: Path):
    process, _, ballast = train_until_full(small_disk, 1, 1)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "could not be written within 1 s (run.disk_wait_s): the disk is full" in error
    assert "--resume" in error
    ballast.unlink()
    assert sluice("train", "--resume", "runs/full") == 0
    whole = finished("train", "config.yaml", f"run.num_steps={NUM_STEPS}", "checkpoint.every_steps=1", name="whole")
    assert_same_runs(whole, small_disk / "full", NUM_STEPS)
