"""The ledger: every sample of every step, with what each token saw, as one Parquet file per step.

`pyarrow.parquet.read_table("runs/NAME/ledger/step-000017.parquet")` reads it without sluice; `COLUMNS` says what a
column holds, and so does the schema in the file itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sluice.errors import DataError
from sluice.tracking.rundir import RunDir, finite, write_atomically
from sluice.types import Group, Sample, Trajectory, join_kept_ids, join_routed_experts, pack_routed_experts

Pieces = Callable[[Sequence[int]], list[str]]
"""Token ids → one readable text per token."""

_TOKEN_FLOATS = pa.list_(pa.float32())  # what the trainer computes in

COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "group": (pa.int64(), "Id of the group; its trajectories were compared with each other."),
    "index": (pa.int32(), "Which trajectory of the group; several rows share it when the agent edited its history."),
    "prompt_id": (pa.string(), "Id of the prompt."),
    "messages": (pa.string(), "The prompt as JSON: a list of messages with role and content."),
    "reference": (pa.string(), "What rewards compare with, as JSON; null when there is none."),
    "metadata": (pa.string(), "Further columns of the data row, as JSON."),
    "where": (pa.string(), "File and line of the data row."),
    "response": (pa.string(), "Text of the trajectory's last completion."),
    "finish_reason": (pa.string(), "Why its last completion ended: stop, length, repetition or abort."),
    "stop_reason": (pa.string(), "Why the environment ended the trajectory."),
    "outcome": (pa.string(), "scored, or why there is no score: error, timeout or pending."),
    "error": (pa.string(), "What went wrong when there is no score."),
    "reward": (pa.float64(), "Weighted sum of the parts; null without a score."),
    "reward_parts": (pa.map_(pa.string(), pa.float64()), "Reward by name of the part, before weighting."),
    "rejected": (pa.string(), "Why the group was not trained on; empty when it was."),
    "trained": (pa.bool_(), "Whether an optimiser update took the sample; the last one may have been refused."),
    "update": (pa.int32(), "Which update of the step took it, from 0; -1 when none did."),
    "temperature": (pa.float64(), "Sampling temperature; null when nothing was sampled."),
    "token_ids": (pa.list_(pa.int32()), "[T] prompt, response and whatever the environment said between."),
    "tokens": (pa.list_(pa.string()), "[T] text of each token."),
    "policy_versions": (pa.list_(pa.int32()), "[T] which weights made the token; -1 where the policy did not write."),
    "logprobs": (_TOKEN_FLOATS, "[T] log-probability by the engine, in nats; 0 where the policy did not write."),
    "kept_ids": (
        pa.list_(pa.list_(pa.int32())),
        "[T] the ids that top-p and top-k left to draw the token from; an empty list where they dropped none or the "
        "policy did not write, and empty altogether where they never did.",
    ),
    "routed_experts": (
        pa.binary(),
        "[T · layers · k] with rollout.routing_replay the experts that the engine's routers chose: little-endian 16-bit numbers, token after "
        "token and layer after layer; 65535 where that is not known, and empty without.",
    ),
    "loss_weights": (_TOKEN_FLOATS, "[T] weight in the loss, 0 for none; empty (as all below) when not trained on."),
    "advantages": (_TOKEN_FLOATS, "[T] advantage."),
    "old_logprobs": (_TOKEN_FLOATS, "[T] log-probability that the ratio divides by, in nats."),
    "ref_logprobs": (_TOKEN_FLOATS, "[T] log-probability by the reference policy, in nats; empty without a KL term."),
    "values": (_TOKEN_FLOATS, "[T] value by the critic before the step's first update; empty without a critic."),
    "returns": (_TOKEN_FLOATS, "[T] what the critic learned; empty without a critic."),
    "turn_rewards": (pa.list_(pa.float64()), "Reward of each turn of the trajectory; they add up to the reward."),
    "turn_ids": (pa.list_(pa.int32()), "[T] which turn wrote the token, from 0; -1 where the policy did not write."),
    "current_logprobs": (_TOKEN_FLOATS, "[T] log-probability by the trainer at the update that took it, in nats."),
    "ratios": (_TOKEN_FLOATS, "[T] importance ratio at that update; 1 where there is no loss."),
    "clipped": (pa.list_(pa.bool_()), "[T] whether a bound or the mask changed the token's gradient."),
}
"""Type and meaning of each column; [T] are lists with an entry per token of the sequence."""

SCHEMA = pa.schema([pa.field(name, type, metadata={"meaning": text}) for name, (type, text) in COLUMNS.items()])

_OF_SAMPLE = [name for name, (type, _) in COLUMNS.items() if pa.types.is_list(type) and name != "tokens"]
_OF_SAMPLE += ["routed_experts"]
"""What a sample holds under the column's own name."""

_REPEATING = [name for name, (type, _) in COLUMNS.items() if type == pa.string()] + [
    f"{name}.list.element"
    for name in ("token_ids", "tokens", "policy_versions", "kept_ids.list.element", "loss_weights", "advantages")
]
"""Columns worth a dictionary; for the other floats it makes the file a third larger."""


def write_step(
    rundir: RunDir,
    step: int,
    groups: Sequence[Group],
    samples: Sequence[Sample],
    pieces: Pieces,
    fingerprint: str | None = None,
) -> Path:
    """Write one row per sample, and one per unbroken history of a trajectory that gave none (rejected, no score).

    `fingerprint` is that of the weights after the step; it goes into the file's metadata. The file appears whole or not at
    all. Raises ValueError for a sample of a group that is not given.
    """
    by_trajectory: dict[tuple[int, int], list[Sample]] = {}
    for sample in samples:
        by_trajectory.setdefault((sample.group, sample.index), []).append(sample)
    rows: list[dict[str, Any]] = [
        about | _of_trajectory(trajectory) | {"index": index} | part
        for group in groups
        for about in (_of_group(group),)
        for index, trajectory in enumerate(group.trajectories)
        for part in _parts(trajectory, by_trajectory.pop((group.id, index), []))
    ]
    if by_trajectory:
        raise ValueError(f"step {step}: samples of unknown trajectories (group, index): {sorted(by_trajectory)[:4]}")
    ids = list({i for row in rows for i in row["token_ids"]})
    texts = dict(zip(ids, map(_text, pieces(ids)), strict=True))
    for row in rows:
        row["tokens"] = [texts[i] for i in row["token_ids"]]
        row["routed_experts"] = pack_routed_experts(row["routed_experts"])
    rundir.ledger.mkdir(exist_ok=True)
    path = _path(rundir, step)
    table = pa.Table.from_pylist(rows, SCHEMA.with_metadata({"fingerprint": fingerprint} if fingerprint else None))
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": _REPEATING}
    write_atomically(path, lambda file: pq.write_table(table, file, **options))
    return path


def read_step(rundir: RunDir, step: int, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a step (all columns, or those named). Raises DataError naming a file that is missing or broken."""
    path = _path(rundir, step)
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: step {step} is not in the ledger") from None
    except (OSError, pa.ArrowException) as error:
        raise _broken(path, error) from None
    if missing := [name for name in columns or COLUMNS if name not in table.column_names]:
        raise DataError(
            f"{path} is not as this version writes it (it has no column {missing[0]}); read it with the version that environment.json names"
        )
    return table


def read_fingerprint(rundir: RunDir, step: int) -> str | None:
    """Of the weights after the step; None when it was refused, or there are no weights. Raises DataError as `read_step`."""
    return (_metadata(rundir, step).metadata or {}).get(b"fingerprint", b"").decode() or None


def num_rows(rundir: RunDir, step: int) -> int:
    """How many rows a step has, without reading them. Raises DataError as `read_step`."""
    return _metadata(rundir, step).num_rows


def _metadata(rundir: RunDir, step: int) -> pq.FileMetaData:
    path = _path(rundir, step)
    try:
        return pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise _broken(path, error) from None


def steps(rundir: RunDir) -> list[int]:
    """The steps in the ledger, in order; empty without one."""
    names = (path.stem.removeprefix("step-") for path in rundir.ledger.glob("step-*.parquet"))
    return sorted(int(name) for name in names if name.isdecimal())


def _path(rundir: RunDir, step: int) -> Path:
    return rundir.ledger / f"step-{step:06d}.parquet"


def _broken(path: Path, error: Exception) -> DataError:
    return DataError(f"cannot read {path}: {error}; the other steps can be read when it is removed")


def _of_group(group: Group) -> dict[str, Any]:
    """What all rows of a group share."""
    prompt = group.prompt
    return {
        "group": group.id,
        "prompt_id": _text(prompt.id),
        "messages": _json(list(prompt.messages)),
        "reference": None if prompt.reference is None else _json(prompt.reference),
        "metadata": _json(dict(prompt.metadata)),
        "where": _text(prompt.where),
        "rejected": _text(group.rejected),
    }


def _of_trajectory(trajectory: Trajectory) -> dict[str, Any]:
    """What all rows of a trajectory share."""
    return {
        "response": _text(trajectory.response),
        "finish_reason": trajectory.turns[-1].completion.finish_reason if trajectory.turns else None,
        "stop_reason": _text(trajectory.stop_reason),
        "outcome": trajectory.outcome,
        "error": _text(trajectory.error),
        "reward": trajectory.reward,
        "reward_parts": [(_text(name), value) for name, value in trajectory.reward_parts.items()],
    }


def _parts(trajectory: Trajectory, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    """What each row of a trajectory has of its own."""
    for sample in samples:
        yield {
            "trained": sample.update >= 0,
            "update": sample.update,
            "temperature": sample.temperature,
            **{name: getattr(sample, name) for name in _OF_SAMPLE},
        }
    if not samples:
        untrained = {"trained": False, "update": -1, **{name: [] for name in _OF_SAMPLE}}
        for history in _histories(trajectory) or [{}]:
            yield untrained | history


def _histories(trajectory: Trajectory) -> list[dict[str, Any]]:
    """The unbroken token sequences of a trajectory: a turn whose prompt goes on from all ids before it extends one."""
    histories: list[dict[str, Any]] = []
    for turn in trajectory.turns:
        completion = turn.completion
        if not histories or turn.prompt_ids[: len(histories[-1]["token_ids"])] != histories[-1]["token_ids"]:
            histories.append(
                {"token_ids": [], "policy_versions": [], "logprobs": [], "kept_ids": [], "routed_experts": []}
            )
        history = histories[-1]
        given = turn.prompt_ids[len(history["token_ids"]) :]
        history["temperature"] = completion.temperature
        history["kept_ids"] = join_kept_ids(
            (history["kept_ids"], len(history["token_ids"])),
            ([], len(given)),
            (completion.kept_ids, len(completion.token_ids)),
        )
        history["routed_experts"] = join_routed_experts(
            history["routed_experts"], completion.routed_experts, len(turn.prompt_ids) + len(completion.token_ids)
        )
        history["token_ids"] = history["token_ids"] + given + completion.token_ids
        history["policy_versions"] = history["policy_versions"] + [-1] * len(given) + completion.policy_versions
        history["logprobs"] = history["logprobs"] + [0.0] * len(given) + completion.logprobs
    return histories


def _text(text: str) -> str:
    """Lone surrogates, which JSON data may hold, are no UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _json(value: Any) -> str:
    return json.dumps(finite(value), default=str)
