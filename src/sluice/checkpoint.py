"""Checkpoints: model folders that `transformers` loads, with all that a run needs to go on as if it had never stopped.

A checkpoint is written beside its final name by a thread, brought to disk, and renamed: it is there as a whole or not at
all. `checksums.json` is the last of its files, so that one that was damaged later is recognised.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import random
import shutil
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sluice.data.sources import did_you_mean
from sluice.errors import ConfigError, RunFolderError, TrainingError, boundary
from sluice.rollout.buffer import BufferState
from sluice.rollout.calls import Call
from sluice.run import Run
from sluice.tracking.rundir import RunDir, patiently, sync_folder
from sluice.types import Completion, Group, Trajectory, Turn, pack_routed_experts, unpack_routed_experts

STATE, POSITION, CHECKSUMS = "trainer_state.pt", "run_state.json", "checksums.json"
FORMAT = 3
"""Of these files; another one means another sluice."""
Write = Callable[[str], dict[str, Any]]
"""What a trainer's snapshot returns."""


class Checkpoints:
    """Writes the checkpoints of a run, one at a time, and removes those that are not to be kept."""

    def __init__(
        self,
        rundir: RunDir,
        *,
        every_steps: int | None,
        keep_last: int | None,
        best_metric: str | None,
        best: Literal["max", "min"],
        disk_wait_s: float,
        tell: Callable[[str, str], None],
    ) -> None:
        """`every_steps` None writes one at the end only, `keep_last` None keeps all; `tell` takes kind and text of an event."""
        self.rundir = rundir
        self.every_steps, self.keep_last, self.best_metric = every_steps, keep_last, best_metric
        self._sign = 1 if best == "max" else -1
        self._disk_wait_s, self._tell = disk_wait_s, tell
        self._writing: asyncio.Future[None] | None = None
        self._metric: float | None = None
        self._rng: dict[str, Any] | None = None
        """As the last step ended: an attempt that is made again draws what it drew."""

    def step_ended(self) -> None:
        """To be called before attempts of the next step begin, which may draw from the generators that all share."""
        self._rng = random_state()

    async def after_step(self, run: Run, metrics: dict[str, float]) -> None:
        """Copy the state if it is its turn, once the last checkpoint is written, and write it while the run goes on.

        Raises what went wrong with the last one, and ConfigError for a best metric that there is not.
        """
        if self.best_metric and self.best_metric not in metrics and run.step > run.pretrain_steps:
            raise ConfigError(
                f"checkpoint.best_metric={self.best_metric} is no metric of this run{did_you_mean(self.best_metric, metrics)}"
            )
        self._metric = metrics.get(self.best_metric) if self.best_metric else None
        if run.step == run.num_steps or (self.every_steps and run.step % self.every_steps == 0):
            await self._save(run)

    async def save_now(self, run: Run) -> None:
        """Write the state after the last step, if that is not done, and wait until it is on disk."""
        await self.finish()
        if not self.rundir.checkpoint(run.step).exists():
            await self._save(run)
            await self.finish()

    async def _save(self, run: Run) -> None:
        await note_unfinished(run)
        position, rng = position_of(run, self._metric), self._rng or random_state()
        await self.finish()
        step, write = run.step, run.trainer.snapshot()

        def work() -> None:
            with run.waits("checkpoint", "writing", f"step {step}"):
                self._write(step, write, position, rng)

        self._writing = asyncio.get_running_loop().run_in_executor(None, work)

    @property
    def is_writing(self) -> bool:
        return self._writing is not None and not self._writing.done()

    async def finish(self) -> None:
        """Wait until the checkpoint that is being written is on disk. Raises what went wrong with it."""
        writing = self._writing
        if writing is None:
            return
        try:
            await asyncio.shield(writing)  # whoever is cancelled while waiting leaves the writing to the next who waits
        finally:
            if writing.done():
                self._writing = None

    def _write(self, step: int, write: Write, position: dict[str, Any], rng: dict[str, Any]) -> None:
        what = f"checkpoint {self.rundir.checkpoint(step)}"
        with boundary(TrainingError, f"{what} could not be written"):
            work = partial(write_checkpoint, self.rundir, step, write, position, rng)
            patiently(work, what, self._disk_wait_s, partial(self._tell, "disk_full"))
            self._prune()

    def _prune(self) -> None:
        """Keep the last ones, and besides the one with the best metric."""
        if self.keep_last is None:
            return
        old = self.rundir.checkpoint_folders()
        scored = [(self._sign * value, folder) for folder in old if (value := _metric_of(folder)) is not None]
        kept = {*old[-self.keep_last :], *([max(scored)[1]] if scored else [])}
        for folder in old:
            if folder not in kept:
                shutil.rmtree(folder)


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it is read."""

    folder: Path
    step: int
    position: dict[str, Any]
    trainer: dict[str, Any]
    rng: dict[str, Any]

    def is_end_of(self, num_steps: int, stop_at_reward: float | None) -> bool:
        """Whether a run of so many steps, or up to such a reward, ends here."""
        reached = self.position["reward_reached"]
        return self.step >= num_steps or (reached is not None and reached == stop_at_reward)

    def buffer_state(self, prompts: Any) -> BufferState:
        """`prompts` gives the prompt of a ticket."""
        state = self.position["buffer"]
        done = {
            int(ticket): Group(
                int(ticket), prompts[int(ticket)], [*map(_trajectory, group["trajectories"])], group["rejected"]
            )
            for ticket, group in state["done"].items()
        }
        calls = {
            int(seed): Call(**{**call, "made": _completion(call["made"])}) for seed, call in state["calls"].items()
        }
        return BufferState(**{**state, "done": done, "calls": calls})


def write_checkpoint(
    rundir: RunDir, step: int, write: Write, position: dict[str, Any], rng: dict[str, Any] | None = None
) -> Path:
    """Write `checkpoints/step-000100` beside its final name, bring it to disk, and rename it."""
    final = rundir.checkpoint(step)
    unfinished = final.with_name(f".{final.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        trainer = write(str(unfinished))
        with open(unfinished / STATE, "wb") as file:
            torch.save({"trainer": trainer, "rng": rng or {}}, file)
        (unfinished / POSITION).write_text(json.dumps({"format": FORMAT, "step": step, **position}, default=float))
        if rundir.config.exists():
            shutil.copyfile(rundir.config, unfinished / "run_config.yaml")
        _seal(unfinished)
        unfinished.rename(final)
        sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)  # a full disk has better uses
        raise
    return final


def read_newest(rundir: RunDir, before: int | None = None) -> tuple[Saved | None, list[str]]:
    """The newest whole checkpoint (of a step below `before`), None where there never was one; and what is wrong with those
    that are newer. Raises RunFolderError when there are some and none is whole."""
    folders = [
        folder
        for folder in rundir.checkpoint_folders()
        if before is None or int(folder.name.removeprefix("step-")) < before
    ]
    damage: list[str] = []
    for folder in reversed(folders):
        what = damage_of(folder)
        try:
            if not what:
                return read_checkpoint(folder), damage
        except RunFolderError:
            raise
        except Exception as error:  # whole, and yet not what sluice writes
            what = f"{type(error).__name__}: {error}"
        damage.append(f"{folder} cannot be used: {what}")
    if damage and before is None:
        raise RunFolderError(
            f"none of the {len(damage)} checkpoints in {rundir.checkpoints} is whole ({damage[0]}); restore one from a backup, "
            "or remove the folder to begin again from the first step"
        )
    return None, damage


def read_checkpoint(folder: Path) -> Saved:
    """Raises RunFolderError for one of another sluice."""
    position = json.loads((folder / POSITION).read_text())
    if position.get("format") != FORMAT:
        raise RunFolderError(
            f"{folder} was written by a sluice that writes checkpoints otherwise; go on with that one (environment.json names "
            "its version), or begin a new run with model.path at this folder"
        )
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    return Saved(folder, position["step"], position, state["trainer"], state["rng"])


def damage_of(folder: Path) -> str:
    """What is wrong with the files of a checkpoint; empty when all are as they were written."""
    try:
        expected: dict[str, dict[str, Any]] = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read ({type(error).__name__}: {error})"
    if not isinstance(expected, dict) or STATE not in expected or POSITION not in expected:
        return f"{CHECKSUMS} does not name the files of a checkpoint"
    for name, checksum in expected.items():
        try:
            found = _checksum(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != checksum:
            return f"{name} was written with {checksum}, and has {found}"
    return ""


async def note_unfinished(run: Run) -> None:
    """Ask the engine for what it is making, so that a run that goes on has it; a synchronous one samples the whole step again."""
    if not run.buffer.synchronous:
        run.buffer.calls.note(await run.engine.unfinished())


def position_of(run: Run, metric: float | None) -> dict[str, Any]:
    """Where a run stands between two steps, as JSON; of prompts only what they depend on, since tickets are positions."""
    buffer: BufferState = run.buffer.state()
    done = {
        ticket: {"trajectories": [_saved(t) for t in group.trajectories], "rejected": group.rejected}
        for ticket, group in buffer.done.items()
    }
    return {
        "metric": metric,
        "reward_reached": run.stop_at_reward if run.reward_reached else None,
        "prompts": run.prompts.identity(),
        "checks": run.checks.state_dict(),
        "buffer": {
            "head": buffer.head,
            "next_ticket": buffer.next_ticket,
            "failed_in_a_row": buffer.failed_in_a_row,
            "done": done,
            "calls": {seed: _own(call, Call, made=_saved_completion(call.made)) for seed, call in buffer.calls.items()},
        },
    }


def seed_random_state(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Of the global generators: sluice's own draws have seeds by ticket, but environments may use these."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(rng: dict[str, Any]) -> None:
    version, keys, gauss = rng["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = rng["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(rng["torch"])
    if len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(rng["cuda"])


def _saved(trajectory: Trajectory) -> dict[str, Any]:
    turns = [_own(turn, Turn, completion=_saved_completion(turn.completion)) for turn in trajectory.turns]
    return _own(trajectory, Trajectory, turns=turns)


def _saved_completion(completion: Any) -> dict[str, Any]:
    routed = completion.routed_experts
    return _own(completion, Completion, routed_experts=[len(routed), b64encode(pack_routed_experts(routed)).decode()])


def _own(value: Any, kind: type, **others: Any) -> dict[str, Any]:
    """The fields that are the kind's own, and not those that a subclass of a user has; `others` in place of some."""
    return {field.name: getattr(value, field.name) for field in fields(kind)} | others


def _trajectory(saved: dict[str, Any]) -> Trajectory:
    turns = [Turn(**{**turn, "completion": _completion(turn["completion"])}) for turn in saved["turns"]]
    return Trajectory(**{**saved, "turns": turns})


def _completion(saved: dict[str, Any]) -> Completion:
    count, routed = saved["routed_experts"]
    return Completion(**{**saved, "routed_experts": unpack_routed_experts(b64decode(routed), count)})


def _metric_of(folder: Path) -> float | None:
    """None for a checkpoint without one, or whose is no number."""
    try:
        metric = json.loads((folder / POSITION).read_text())["metric"]
    except (OSError, ValueError, KeyError):
        return None
    return metric if isinstance(metric, float | int) and math.isfinite(metric) else None


def _seal(folder: Path) -> None:
    """Bring all files to disk, and last a file with their checksums."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    checksums = {str(path.relative_to(folder)): _checksum(path, sync=True) for path in files}
    with open(folder / CHECKSUMS, "w") as file:
        json.dump(checksums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for path in {folder, *(path.parent for path in files)}:
        sync_folder(path)


def _checksum(path: Path, sync: bool = False) -> dict[str, Any]:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "blake2b": hashlib.file_digest(file, "blake2b").hexdigest()[:32]}
