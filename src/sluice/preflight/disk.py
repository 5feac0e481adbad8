"""Whether the record of a run has a place, and room there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sluice.algorithms import Algorithm
from sluice.config import SftConfig, TrainConfig
from sluice.preflight.findings import Item, size

SAMPLED_TOKEN_BYTES = 28
"""In the ledger, for text that does not compress at all: 24 measured with 16,000 tokens, and ratios of later updates."""
FURTHER_COLUMN_BYTES = 3.2
"""A log-prob or value of a token in FP32, which compresses badly."""
KEPT_ID_BYTES = 1.9
"""One id that top-k kept for a token."""
EXPERT_BYTES = 2
"""The number of one that a token took, which compresses as well as routers are undecided."""
PROMPT_TOKEN_BYTES = 1
"""The samples of a group repeat it."""
ROW_BYTES = 200
STEP_BYTES = 24_000
"""Of a file of the ledger, whatever is in it: its schema says what each column means, and each has pages of its own."""
SHORT = 0.1
"""Responses are taken to be at least this share of rollout.max_new_tokens."""


def check_disk(config: TrainConfig | SftConfig, checkpoint_bytes: float, num_checkpoints: int, ledger: float) -> Item:
    """`ledger` is its size at most, in bytes."""
    item, run = Item("disk"), config.run
    folder = Path(run.folder).expanduser()
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    resumes = isinstance(config, TrainConfig) and config.checkpoint.auto_resume
    if run.name and (folder / run.name).exists() and not resumes:
        item.fail(
            f"the run folder {folder / run.name} exists already; choose another name with run.name=…, or remove the folder"
        )
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".sluice-check-"):
            pass
    except OSError as error:
        item.fail(
            f"run.folder={run.folder}: nothing can be written in {parent}: {error.strerror}; choose another place with run.folder=…"
        )
        return item
    free, checkpoints = shutil.disk_usage(parent).free, checkpoint_bytes * num_checkpoints
    total = checkpoints + ledger
    item.summary = f"at most about {size(total)}; {size(free)} are free in {parent}"
    if ledger:
        item.note(f"ledger {size(ledger)}, checkpoints {num_checkpoints} × {size(checkpoint_bytes)}")
    if checkpoints + SHORT * ledger > free:
        item.fail(
            f"{num_checkpoints} checkpoints take {size(checkpoints)}, and the ledger {size(ledger)} or, with responses of a tenth of "
            f"the allowed length, a tenth of that; {size(free)} are free. Set run.folder to a larger disk"
            + (", lower checkpoint.keep_last" if num_checkpoints > 1 else "")
            + ", or make fewer steps"
        )
    elif total > free:
        item.warn(
            f"with responses as long as they may be the record takes {size(total)}, and {size(free)} are free; look after it, or set "
            "run.folder to a larger disk"
        )
    return item


def ledger_bytes(config: TrainConfig, algorithm: Algorithm, longest_prompt: int, experts: int = 0) -> float:
    """Of all steps, when every response has rollout.max_new_tokens. So many `experts` are noted of each token."""
    rollout = config.rollout
    per_token = SAMPLED_TOKEN_BYTES + KEPT_ID_BYTES * rollout.top_k
    per_token += FURTHER_COLUMN_BYTES * sum(_further_columns(config, algorithm))
    per_row = ROW_BYTES + PROMPT_TOKEN_BYTES * longest_prompt + per_token * rollout.max_new_tokens
    per_row += EXPERT_BYTES * experts * (longest_prompt + rollout.max_new_tokens)
    return config.run.num_steps * (STEP_BYTES + rollout.groups_per_step * rollout.group_size * per_row)


def num_checkpoints(config: TrainConfig) -> int:
    """Those that are on the disk at once: the kept ones, the best one, and the one that is being written."""
    checkpoint, steps = config.checkpoint, config.run.num_steps
    written = -(-steps // checkpoint.every_steps) if checkpoint.every_steps else 1
    kept = written if checkpoint.keep_last is None else checkpoint.keep_last + (checkpoint.best_metric is not None) + 1
    return min(written, kept)


def _further_columns(config: TrainConfig, algorithm: Algorithm) -> Iterator[int]:
    yield algorithm.needs_reference
    yield 2 * algorithm.needs_values
    yield config.algorithm.old_logprobs == "recomputed"
