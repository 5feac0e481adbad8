"""A checkpoint of an asynchronous run holds what was sampled and not trained: nothing is lost, nothing is trained twice."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dry_runs import GROUP_SIZE, GROUPS_PER_STEP, Notes, Timing, Workshop, finish
from same import same
from sluice.checkpoint import Checkpoints, read_newest, write_checkpoint
from sluice.errors import RunFolderError, TrainingError
from sluice.rollout.buffer import BufferState, GroupBuffer
from sluice.run import Run
from sluice.tracking.rundir import RunDir
from sluice.train import train
from sluice.types import Group, Trajectory

NUM_STEPS = 8


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("workshop"))


def checkpointed(workshop: Workshop, folder: Path, max_staleness: int, seed: int, **changes: Any) -> Run:
    timing = Timing(engine_s=0.004, score_s=0.003, train_s=0.002, seed=seed)
    run = workshop.run(
        timing, max_staleness=max_staleness, algorithm="dapo", script=workshop.digits_or_nothing_new, **changes
    )
    run.num_steps = NUM_STEPS
    run.checkpoints = Checkpoints(
        RunDir(folder),
        every_steps=1,
        keep_last=None,
        best_metric=None,
        best="max",
        disk_wait_s=0,
        tell=run.tracker.event,
    )
    return run


async def whole(run: Run) -> None:
    await train(run)
    await run.checkpoints.finish()


def resumed(workshop: Workshop, folder: Path, max_staleness: int, seed: int, step: int) -> tuple[Run, BufferState]:
    """As `launch` does it, from the checkpoint of a step."""
    saved, damage = read_newest(RunDir(folder), before=step + 1)
    assert saved is not None
    assert (saved.step, damage) == (step, [])
    run = checkpointed(workshop, folder / "resumed", max_staleness, seed)
    state = saved.buffer_state(run.prompts)
    run.buffer = GroupBuffer(GROUPS_PER_STEP, max_staleness, run.buffer.limits, state)
    run.step = step
    run.trainer.restore(str(saved.folder), saved.trainer)
    run.checks.load_state_dict(saved.position["checks"])
    return run, state


@pytest.mark.parametrize("step", [1, 4, 7])
@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_no_ticket_is_lost_or_trained_twice(workshop: Workshop, tmp_path: Path, max_staleness: int, step: int):
    """Whatever was out when the checkpoint was written, and with another timing afterwards; the checks look on, too."""
    first = checkpointed(workshop, tmp_path, max_staleness, seed=1)
    finish(whole(first))
    run, _ = resumed(workshop, tmp_path, max_staleness, 2, step)
    finish(whole(run))
    before, after = first.tracker, run.tracker
    assert isinstance(before, Notes)
    assert isinstance(after, Notes)
    groups = [g for n in range(1, step + 1) for g in before.groups[n]]
    groups += [g for n in range(step + 1, NUM_STEPS + 1) for g in after.groups[n]]
    assert sorted(g.id for g in groups) == list(range(len(groups)))
    assert [g.prompt.id for g in groups] == [run.prompts[g.id].id for g in groups]
    assert [len(after.samples[n]) for n in range(step + 1, NUM_STEPS + 1)] == [GROUPS_PER_STEP * GROUP_SIZE] * (
        NUM_STEPS - step
    )
    assert max(after.metrics[n]["rollout/staleness/max"] for n in after.metrics) <= max_staleness
    assert after.events == []
    if max_staleness == 0:
        assert [vars(s) for s in after.samples[NUM_STEPS]] == [vars(s) for s in before.samples[NUM_STEPS]]
        assert run.trainer.updates == first.trainer.updates  # type: ignore[attr-defined]


def test_finished_groups_are_kept_as_they_were(workshop: Workshop, tmp_path: Path):
    """Not sampled again: tokens, log-probs, scores and versions are those of the process that is gone."""
    first = checkpointed(workshop, tmp_path, 3, seed=1)
    finish(whole(first))
    kept = 0
    for step in range(1, NUM_STEPS):
        _, state = resumed(workshop, tmp_path, 3, 2, step)
        trained = {g.id: g for n in range(step + 1, NUM_STEPS + 1) for g in first.tracker.groups[n]}  # type: ignore[attr-defined]
        for ticket, group in state.done.items():
            if ticket in trained:
                kept += 1
                assert group == trained[ticket]
        assert set(state.done) <= set(range(state.head, state.next_ticket))
    assert kept > 5, "the test shows nothing"


def test_the_run_goes_on_while_a_checkpoint_is_written(tmp_path: Path, workshop: Workshop):
    """What is written is the state as it was when it was asked for, however slow the disk is."""
    run = checkpointed(workshop, tmp_path, 0, seed=1)
    snapshot, written = run.trainer.snapshot, []

    def slow() -> Any:
        write = snapshot()

        def wait_and_write(folder: str) -> dict[str, Any]:
            time.sleep(0.3)
            written.append(len(run.trainer.updates))  # type: ignore[attr-defined]
            return write(folder)

        return wait_and_write

    run.trainer.snapshot = slow  # type: ignore[method-assign]
    run.checkpoints.every_steps, run.num_steps = 2, 4
    finish(whole(run))
    assert written[0] > 2 * 2, "training went on meanwhile: two updates a step"
    saved, _ = read_newest(RunDir(tmp_path), before=3)
    assert saved is not None
    assert saved.trainer["updates"] == run.trainer.updates[:4]  # type: ignore[attr-defined]


def test_what_goes_wrong_in_the_writer_ends_the_run(tmp_path: Path, workshop: Workshop):
    run = checkpointed(workshop, tmp_path, 0, seed=1)

    def broken(folder: str) -> dict[str, Any]:
        raise PermissionError("no right to write")

    run.trainer.snapshot = lambda: broken  # type: ignore[method-assign]
    with pytest.raises(
        TrainingError, match=r"checkpoint .*step-000001 could not be written: PermissionError: no right"
    ):
        finish(whole(run))
    assert not list(tmp_path.rglob("*.partial"))
    assert RunDir(tmp_path).checkpoint_folders() == []


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path):
    folder = write_checkpoint(RunDir(tmp_path), 3, lambda folder: {}, {"format": 0, "metric": None})
    assert folder.name == "step-000003"
    with pytest.raises(RunFolderError, match="written by a sluice that writes checkpoints otherwise"):
        read_newest(RunDir(tmp_path))


def test_same_sees_one_bit():
    """The comparison that all these tests rest on."""
    import torch

    tree = {"a": [torch.ones(3), 1.0, None], "b": (float("nan"), "x")}
    assert same(tree, {"a": [torch.ones(3), 1.0, None], "b": (float("nan"), "x")})
    other = torch.ones(3)
    other[1] = 1 + 2**-23
    assert not same(tree, {"a": [other, 1.0, None], "b": (float("nan"), "x")})
    assert not same(tree, {"a": [torch.ones(3), 1.0], "b": (float("nan"), "x")})


def test_a_stopped_buffer_tells_whoever_takes(workshop: Workshop):
    """Also one that waits already."""
    from sluice.errors import RunStopped

    async def work() -> None:
        run = workshop.run()
        taking = asyncio.create_task(run.buffer.take(3))
        await asyncio.sleep(0)
        await run.buffer.stop()
        with pytest.raises(RunStopped):
            await taking
        await run.buffer.admit()
        await run.buffer.put(Group(0, run.prompts[0], []))
        with pytest.raises(RunStopped):  # though there is one to take
            await run.buffer.take(1)

    asyncio.run(work())


def test_a_cancelled_wait_leaves_the_writing_to_the_next_who_waits(workshop: Workshop, tmp_path: Path):
    """Ctrl-C while the loop waits for the last checkpoint: it is written all the same."""
    run = checkpointed(workshop, tmp_path, 0, seed=1)

    def slow(folder: str) -> dict[str, Any]:
        time.sleep(0.3)
        return {"updates": []}

    run.trainer.snapshot = lambda: slow  # type: ignore[method-assign]

    async def work() -> None:
        run.step = 1
        await run.checkpoints.after_step(run, {})
        waiting = asyncio.create_task(run.checkpoints.finish())
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await run.checkpoints.finish()
        assert RunDir(tmp_path).checkpoint(1).is_dir()

    asyncio.run(work())


def test_what_is_whole_and_yet_no_checkpoint_is_passed_over(tmp_path: Path):
    """Files with the right checksums that sluice never wrote: the one before is taken."""
    rundir = RunDir(tmp_path)
    write_checkpoint(rundir, 1, lambda folder: {}, {"metric": None})
    for step, position in ((2, "[]"), (3, "null"), (4, "no json")):
        folder = write_checkpoint(rundir, step, lambda folder: {}, {"metric": None})
        (folder / "run_state.json").write_text(position)
        checksums = json.loads((folder / "checksums.json").read_text())
        content = position.encode()
        checksums["run_state.json"] = {"bytes": len(content), "blake2b": hashlib.blake2b(content).hexdigest()[:32]}
        (folder / "checksums.json").write_text(json.dumps(checksums))
    for step, content in ((5, "[]"), (6, "null"), (7, '{"config.json": 3}'), (8, "{}")):
        (write_checkpoint(rundir, step, lambda folder: {}, {"metric": None}) / "checksums.json").write_text(content)
    saved, damage = read_newest(rundir)
    assert saved is not None
    assert (saved.step, len(damage)) == (1, 7)


@dataclass
class Mine(Trajectory):
    note: object = None


def test_what_users_add_to_a_trajectory_is_no_part_of_a_checkpoint(workshop: Workshop, tmp_path: Path):
    """A subclass, and a reward of NumPy's: such groups wait in the buffer of an asynchronous run."""
    run = checkpointed(workshop, tmp_path, 3, seed=1)

    async def environment(prompt: Any, policy: Any) -> Trajectory:
        await policy.respond(prompt.messages)
        policy.turns[0].reward = np.float32(0.0)
        return Mine(policy.turns, stop_reason="done", note=object())

    run.environment = environment
    finish(whole(run))
    kept = 0
    for step in range(1, NUM_STEPS):
        _, state = resumed(workshop, tmp_path, 3, 2, step)
        kept += len(state.done)
    assert kept > 5, "the test shows nothing"
