"""Any recorded step again: from the weights before it and the samples in the ledger to the same numbers, or to the first
that is another."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sluice.errors import DataError
from sluice.interfaces import Trainer
from sluice.rollout.metrics import annotation_metrics, first_update_metrics
from sluice.tracking import ledger
from sluice.tracking.rundir import RunDir, read_lines
from sluice.types import Completion, Prompt, Sample, Trajectory, Turn, unpack_routed_experts
from sluice.update import prepare, update

COLUMNS = (
    "old_logprobs",
    "ref_logprobs",
    "values",
    "advantages",
    "returns",
    "update",
    "current_logprobs",
    "ratios",
    "clipped",
)
"""What is compared of each sample, in the order in which it is computed."""
SAMPLED = (
    *("token_ids", "loss_weights", "logprobs", "policy_versions", "kept_ids", "turn_ids"),
    "turn_rewards",
)
"""What is taken from the ledger as it is."""


@dataclass
class Replay:
    """What an update needs, put where a checkpoint was written."""

    trainer: Trainer
    algorithm: Any
    packing: Any
    old_logprobs: Literal["engine", "recomputed"]
    pretrain_steps: int
    update_reference_every: int | None
    step: int
    """Finished steps: the next one is replayed."""


@dataclass(frozen=True)
class Replayed:
    """One step, beside what was recorded of it."""

    step: int
    num_samples: int
    difference: str
    """The first quantity that is another than recorded, and where; empty when all are the same to the last bit."""
    metrics: dict[str, tuple[float, float]]
    """Of the update: recorded, and now."""


async def replay_step(replay: Replay, rundir: RunDir) -> Replayed:
    """Make the next step again from its recorded samples, and compare. Raises DataError when it is not on record."""
    step = replay.step + 1
    rows = [row for row in ledger.read_step(rundir, step).to_pylist() if row["loss_weights"]]
    if not rows:
        raise DataError(f"step {step} of {rundir.path} trained on nothing, so there is nothing to replay")
    recorded = _recorded_metrics(rundir, step)
    samples = [_sample(row) for row in rows]
    stats = await update(replay, await prepare(replay, samples))
    stats = stats + first_update_metrics(samples, replay.step) + annotation_metrics(samples)
    replay.step = step
    fingerprint = await replay.trainer.fingerprint()
    if replay.update_reference_every and step % replay.update_reference_every == 0:
        await replay.trainer.update_reference()
    metrics = {name: (recorded[name], value) for name, value in stats.values_by_name().items() if name in recorded}
    difference = (
        _first_difference(rows, samples)
        or _first_other_metric(metrics)
        or _other_weights(ledger.read_fingerprint(rundir, step), fingerprint)
    )
    return Replayed(step, len(samples), difference, metrics)


def recorded_trajectories(rundir: RunDir, step: int, chat: Any) -> list[tuple[Prompt, Trajectory, dict[str, Any]]]:
    """Every sampled trajectory of a step as rewards saw it, with its prompt and its first row of the ledger."""
    by_trajectory: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in ledger.read_step(rundir, step).to_pylist(maps_as_pydicts="lossy"):
        by_trajectory.setdefault((row["group"], row["index"]), []).append(row)
    return [
        (
            _prompt(rows[0]),
            Trajectory([turn for row in rows for turn in _turns(row, chat)], rows[0]["stop_reason"]),
            rows[0],
        )
        for rows in by_trajectory.values()
        # what failed before it came to a reward was never scored
        if rows[0]["token_ids"] and (rows[0]["outcome"] == "scored" or rows[0]["error"].startswith("reward "))
    ]


def disagreement(recorded: dict[str, Any], now: Trajectory) -> str:
    """How a score differs from the one on record; empty when it does not."""
    was, found = recorded["outcome"], now.outcome
    if was != "scored" or found != "scored":
        return "" if was == found else f"was {was} and is {found}{f' ({now.error})' if now.error else ''}"
    parts = {name: value for name, value in recorded["reward_parts"].items() if name != "turns"}  # not the rubric's
    names = [name for name in {**parts, **now.reward_parts} if parts.get(name) != now.reward_parts.get(name)]
    return "; ".join(f"{name} was {parts.get(name)} and is {now.reward_parts.get(name)}" for name in names)


def _sample(row: dict[str, Any]) -> Sample:
    return Sample(
        **{name: row[name] for name in SAMPLED},
        routed_experts=unpack_routed_experts(row["routed_experts"], len(row["token_ids"])),
        temperature=row["temperature"],
        group=row["group"],
        index=row["index"],
        reward=row["reward"],
        prompt_id=row["prompt_id"],
    )


def _prompt(row: dict[str, Any]) -> Prompt:
    reference = None if row["reference"] is None else json.loads(row["reference"])
    return Prompt(row["prompt_id"], json.loads(row["messages"]), reference, json.loads(row["metadata"]), row["where"])


def _turns(row: dict[str, Any], chat: Any) -> list[Turn]:
    """A turn per stretch of tokens that the policy wrote."""
    ids, versions = row["token_ids"], row["policy_versions"]
    turn_ids = row["turn_ids"] or [0 if version >= 0 else -1 for version in versions]
    starts = [t for t, turn in enumerate(turn_ids) if turn >= 0 and (t == 0 or turn_ids[t - 1] != turn)]
    turns = []
    for start in starts:
        end = next((t for t in range(start, len(ids)) if turn_ids[t] != turn_ids[start]), len(ids))
        completion = Completion(
            token_ids=ids[start:end],
            logprobs=row["logprobs"][start:end],
            finish_reason=row["finish_reason"] if end == len(ids) else "stop",
            policy_versions=versions[start:end],
            temperature=row["temperature"],
            text=chat.decode(ids[start:end]),
        )
        turns.append(Turn(ids[:start], completion))
    return turns


def _recorded_metrics(rundir: RunDir, step: int) -> dict[str, float]:
    for line in read_lines(rundir.metrics):
        if line["step"] == step:
            return {name: math.nan if value is None else value for name, value in line.items()}
    raise DataError(f"{rundir.metrics} has no step {step}: its update was refused, or the run ended in it")


def _first_difference(rows: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> str:
    for column in COLUMNS:
        pairs = [
            (row, sample, np.float32(row[column]), np.float32(getattr(sample, column)))
            for row, sample in zip(rows, samples, strict=True)
        ]
        others = [pair for pair in pairs if not np.array_equal(pair[2], pair[3], equal_nan=True)]
        if not others:
            continue
        row, sample, was, now = min(others, key=lambda pair: pair[0]["update"])
        where = f"{column} of sample {sample.name}, update {row['update']}"
        if was.shape != now.shape:
            return f"{where}: {was.size} numbers were recorded, and now there are {now.size}"
        was, now = np.atleast_1d(was), np.atleast_1d(now)
        t = int(np.flatnonzero(~((was == now) | (np.isnan(was) & np.isnan(now))))[0])
        token = f", token {t}" if len(was) > 1 else ""
        return f"{where}{token}: {was[t]!s} was recorded, and now it is {now[t]!s} ({len(others)} of {len(rows)} samples differ)"
    return ""


def _first_other_metric(metrics: dict[str, tuple[float, float]]) -> str:
    for name, (was, now) in metrics.items():
        if was != now and not (math.isnan(was) and not math.isfinite(now)):  # the record has null for nan and inf
            return f"{name}: {was!r} was recorded, and now it is {now!r}"
    return ""


def _other_weights(was: str | None, now: str | None) -> str:
    return (
        "" if was in (now, None) else f"the weights after the step: fingerprint {was} was recorded, and now it is {now}"
    )
