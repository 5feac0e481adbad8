"""Which tokens a bound on the ratio changed, how often and how hard: from the ledgers of runs, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from rich.columns import Columns
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sluice.errors import DataError
from sluice.tracking import ledger
from sluice.tracking.rundir import RunDir

PER_TOKEN = ("token_ids", "tokens", "loss_weights", "advantages", "ratios", "clipped")
KEYS = ["token_id", "token", "update", "sign"]
DEFAULTS = {"old_logprobs": "engine"}
"""Words of the config's `algorithm` that are not null when left out."""
SIGNS = {1.0: "positive", 0.0: "zero", -1.0: "negative"}

Steps = tuple[int | None, int | None]
"""The first and the last step to read; None for no bound."""


@dataclass(frozen=True)
class Clipping:
    """What became of some loss tokens."""

    occurrences: int
    clipped: int
    share: float
    """Clipped ones among the occurrences."""
    mean_log_ratio: float | None
    """Mean of |log ratio| over the clipped ones, in nats; None without any."""
    max_log_ratio: float | None


@dataclass(frozen=True)
class Token:
    token_id: int
    token: str
    total: Clipping
    by_update: dict[int, Clipping]
    """By the update of the step, from 0."""


@dataclass(frozen=True)
class Pool:
    """All runs of one algorithm."""

    algorithm: str
    """Row, and the words that the config changes."""
    runs: list[str]
    num_steps: int
    total: Clipping
    by_update: dict[int, Clipping]
    by_sign: dict[str, Clipping]
    """By the sign of the advantage: positive, zero, negative."""
    tokens: list[Token]
    """Those that were clipped, most often first; among equals, hardest first."""
    num_rare: int
    """Tokens that were clipped, and are not listed because they occur too rarely."""


def analyse(runs: Sequence[str | Path], steps: Steps = (None, None), min_count: int = 1) -> list[Pool]:
    """One pool per algorithm, in the order of the runs; `tokens` are those with at least `min_count` occurrences.

    One step is in memory at a time, with sums per token, update and sign of advantage. Raises DataError for a run
    without a config, a ledger, or a trained sample in these steps, and for a broken file.
    """
    counts: dict[str, pa.Table] = {}
    names: dict[str, list[str]] = {}
    num_steps: dict[str, int] = {}
    for path in {Path(run).resolve(): Path(run) for run in runs}.values():  # a run given twice counts once
        rundir = RunDir(path)
        algorithm, chosen = _algorithm(rundir), _chosen(rundir, steps)
        count = _count_run(rundir, chosen)
        counts[algorithm] = _add(counts[algorithm], count) if algorithm in counts else count
        names.setdefault(algorithm, []).append(str(path))
        num_steps[algorithm] = num_steps.get(algorithm, 0) + len(chosen)
    return [_pool(name, names[name], num_steps[name], count, min_count) for name, count in counts.items()]


# Reading


def _algorithm(rundir: RunDir) -> str:
    """The row of the run's config, and the words that it changes: runs that differ in one are not pooled."""
    if not rundir.path.is_dir():
        raise DataError(f"there is no run folder {rundir.path}; give the folder that `sluice train` printed")
    try:
        section: dict[str, Any] = yaml.safe_load(rundir.config.read_text())["algorithm"]
        changed = {k: v for k, v in section.items() if k != "name" and v not in (None, DEFAULTS.get(k))}
        return ", ".join([section["name"], *(yaml.safe_dump({k: v}).strip() for k, v in changed.items())])
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{rundir.config} does not say the algorithm ({type(error).__name__}: {error}); "
            "give a folder that `sluice train` wrote, with its config.yaml"
        ) from None


def _chosen(rundir: RunDir, steps: Steps) -> list[int]:
    there = ledger.steps(rundir)
    if not there:
        raise DataError(
            f"{rundir.path} has no ledger: either it is of `sluice sft`, which clips nothing, or its first step is not "
            "finished; give a run of `sluice train` that has made a step"
        )
    first, last = steps
    chosen = [s for s in there if (first is None or s >= first) and (last is None or s <= last)]
    if not chosen:
        raise DataError(
            f"{rundir.ledger} has none of these steps, but {there[0]} to {there[-1]}; give others with --steps"
        )
    return chosen


def _count_run(rundir: RunDir, steps: Sequence[int]) -> pa.Table:
    count: pa.Table | None = None
    for step in steps:
        table = ledger.read_step(rundir, step, ["trained", "update", *PER_TOKEN])
        try:
            new = _sums(_loss_tokens(table), KEYS)
        except (TypeError, ValueError, pa.ArrowException) as error:
            raise DataError(
                f"step {step} of {rundir.ledger} is not as this version writes it ({error}); "
                "read it with the version that environment.json names, or leave the step out with --steps"
            ) from None
        count = new if count is None else _add(count, new)
    if not count:
        raise DataError(
            f"no sample of {rundir.path} was trained on in {len(steps)} steps from {steps[0]} to {steps[-1]}; "
            "give steps with an update: `trainer.name: dry` makes none, and rejected groups take part in none"
        )
    return count


def _loss_tokens(table: pa.Table) -> pa.Table:
    """A row per loss token of a step: KEYS, and what `_sums` adds up."""
    table = table.filter(table["trained"])
    lists = {name: table[name].combine_chunks() for name in PER_TOKEN}
    flat = {name: column.flatten() for name, column in lists.items()}
    clipped = flat["clipped"].to_numpy(zero_copy_only=False)
    with np.errstate(divide="ignore"):  # a ratio of 0 lies infinitely far out, and is told as that
        hardness = np.abs(np.log(flat["ratios"].to_numpy().astype(float)))
    log_ratio = pa.array(hardness, mask=~clipped)
    rows = {
        "token_id": flat["token_ids"],
        "token": flat["tokens"],
        "update": table["update"].take(lists["token_ids"].value_parent_indices()),
        "sign": np.sign(flat["advantages"].to_numpy()),
        "occurrences": np.ones(len(clipped), np.int64),
        "clipped": clipped.astype(np.int64),
        "log_ratio": log_ratio,
        "largest": log_ratio,
    }
    return pa.table(rows).filter(flat["loss_weights"].to_numpy() != 0)


def _add(a: pa.Table, b: pa.Table) -> pa.Table:
    return _sums(pa.concat_tables([a, b]), KEYS)


def _sums(rows: pa.Table, keys: list[str]) -> pa.Table:
    """The rows added up by `keys`; the same columns again, so that sums can be added to sums."""
    how = {"occurrences": "sum", "clipped": "sum", "log_ratio": "sum", "largest": "max"}
    sums = rows.group_by(keys, use_threads=False).aggregate(list(how.items()))
    return sums.select([*keys, *("_".join(pair) for pair in how.items())]).rename_columns([*keys, *how])


# What it comes to


def _pool(algorithm: str, runs: list[str], num_steps: int, count: pa.Table, min_count: int) -> Pool:
    tokens = [token for token in _tokens(count) if token.total.clipped]
    listed = [token for token in tokens if token.total.occurrences >= min_count]
    listed.sort(key=lambda token: (-token.total.share, -(token.total.mean_log_ratio or 0), token.token_id))
    signs = _clippings(count, ["sign"])
    return Pool(
        algorithm,
        runs,
        num_steps,
        total=_clippings(count, [])[()],
        by_update={key[0]: clipping for key, clipping in _clippings(count, ["update"]).items()},
        by_sign={name: signs[sign,] for sign, name in SIGNS.items() if (sign,) in signs},
        tokens=listed,
        num_rare=len(tokens) - len(listed),
    )


def _tokens(count: pa.Table) -> Iterator[Token]:
    by_update: dict[tuple[int, str], dict[int, Clipping]] = {}
    for (token_id, token, update), clipping in _clippings(count, ["token_id", "token", "update"]).items():
        by_update.setdefault((token_id, token), {})[update] = clipping
    for (token_id, token), total in _clippings(count, ["token_id", "token"]).items():
        yield Token(token_id, token, total, by_update[token_id, token])


def _clippings(count: pa.Table, keys: list[str]) -> dict[tuple[Any, ...], Clipping]:
    rows = _sums(count, keys).to_pylist()
    rows.sort(key=lambda row: [row[key] for key in keys])
    return {tuple(row[key] for key in keys): _clipping(row) for row in rows}


def _clipping(row: dict[str, Any]) -> Clipping:
    occurrences, clipped = row["occurrences"], row["clipped"]
    mean = row["log_ratio"] / clipped if clipped else None
    return Clipping(occurrences, clipped, clipped / occurrences, mean, row["largest"])


# On the console


def show(pools: Sequence[Pool], top: int) -> Iterator[RenderableType]:
    """What the command prints: a table of tokens per algorithm, then the shares of all algorithms side by side."""
    yield Columns([_token_table(pool, top) for pool in pools], padding=(0, 3))
    yield _side_by_side("update", [pool.by_update for pool in pools], pools)
    yield _side_by_side("advantage", [pool.by_sign for pool in pools], pools)
    yield Text(
        "share: clipped ones among a token's loss-token occurrences; mean and max: of |log ratio| over the clipped ones, in nats."
    )


def _token_table(pool: Pool, top: int) -> Table:
    total = pool.total
    title = f"{pool.algorithm}\n{len(pool.runs)} run(s), {pool.num_steps:,} steps: "
    title += f"{total.clipped:,} of {total.occurrences:,} loss tokens clipped ({total.share:.3%})"
    others = {"--top": max(len(pool.tokens) - top, 0), "--min-count": pool.num_rare}
    also = ", ".join(f"{number:,} below {option}" for option, number in others.items() if number)
    table = Table(title=Text(title), caption=f"also clipped: {also}" if also else None)
    table.add_column("token")
    for head in ("id", "occurs", "clipped", "share", "mean", "max"):
        table.add_column(head, justify="right", no_wrap=True)
    for token in pool.tokens[:top]:
        counts = f"{token.token_id}", f"{token.total.occurrences:,}", f"{token.total.clipped:,}"
        # repr: blanks are seen, and what would steer the terminal is spelled out
        table.add_row(Text(repr(token.token)), *counts, *_figures(token.total))
    return table


def _figures(clipping: Clipping) -> list[str]:
    hardness = ("–" if x is None else f"{x:.3f}" for x in (clipping.mean_log_ratio, clipping.max_log_ratio))
    return [f"{clipping.share:.3%}", *hardness]


def _side_by_side(what: str, columns: Sequence[dict[Any, Clipping]], pools: Sequence[Pool]) -> Table:
    table = Table(title=f"clipped by {what}")
    table.add_column(what, justify="right")
    for pool in pools:
        table.add_column(Text(f"{pool.algorithm}\n{_line('share', 'mean', 'max')}"), justify="right")
    for key in dict.fromkeys(key for column in columns for key in column):
        table.add_row(str(key), *(_line(*_figures(column[key])) if key in column else "–" for column in columns))
    return table


def _line(share: str, mean: str, largest: str) -> str:
    return f"{share:>8} {mean:>7} {largest:>7}"
