"""A run on one page: a single HTML file that needs neither server nor network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from sluice.errors import DataError
from sluice.tracking import ledger
from sluice.tracking.rundir import RunDir, finite, read_lines, write_atomically

MAX_STEPS = 10
"""Steps of which samples are shown."""
MAX_TOKENS = 120_000
"""Response tokens that are shown; each takes some 30 bytes of the page."""
MAX_EVENTS = 200

SETTINGS = (
    "model.path",
    "data.path",
    "algorithm.",
    "rewards.",
    "rollout.groups_per_step",
    "rollout.group_size",
    "rollout.max_new_tokens",
    "rollout.temperature",
    "rollout.max_staleness",
    "engine.name",
    "trainer.learning_rate",
    "trainer.updates_per_batch",
    "trainer.samples_per_update",
    "run.num_epochs",
    "run.seed",
)
"""What is shown of a config above its full text: keys, and sections (with a dot) of which all that is set is shown."""

Series = dict[str, list[float | None]]


def write_report(run: str | Path, max_samples: int = 240) -> Path:
    """Write `report.html` into the run folder and return its path.

    At most `max_samples` samples are put in: whole groups of some evenly spaced steps. Raises DataError for a folder
    that is no run, that has no metrics yet, or of which a file is broken.
    """
    rundir = RunDir(Path(run))
    steps, metrics = _metrics(rundir)
    page = _page(rundir, steps, metrics, _samples(rundir, max_samples))
    write_atomically(rundir.report, page.encode())
    return rundir.report


def _metrics(rundir: RunDir) -> tuple[list[int], Series]:
    """The logged steps, and for each metric a value or None per step; of a step logged twice the later line counts."""
    if not rundir.path.is_dir():
        raise DataError(f"there is no run folder {rundir.path}; give the folder that `sluice train` printed")
    lines = read_lines(rundir.metrics) if rundir.metrics.exists() else []
    by_step = {line["step"]: line for line in lines if isinstance(line.get("step"), int)}
    if not by_step:
        raise DataError(
            f"{rundir.metrics} has no steps: either {rundir.path} is no run folder, or its run has not finished a step; "
            "write the report when it has"
        )
    steps = sorted(by_step)
    names = dict.fromkeys(name for line in by_step.values() for name in line if name != "step")
    return steps, {name: [_number(by_step[step].get(name)) for step in steps] for name in names}


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


# The page


def _page(rundir: RunDir, steps: Sequence[int], metrics: Series, samples: Mapping[str, Any]) -> str:
    from sluice.viewer.curves import draw  # matplotlib takes most of a second to load

    here = Path(__file__).parent
    script = here.joinpath("report.js").read_text()
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    ).get_template("report.html.j2")
    config_text = rundir.config.read_text(errors="replace") if rundir.config.exists() else ""
    config = _leaves(config_text)
    events = read_lines(rundir.events) if rundir.events.exists() else []
    curves = draw(steps, metrics, _unit(metrics))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.render(
        name=rundir.path.resolve().name,
        subject=[config[key] for key in ("algorithm.name", "model.path", "data.path") if config.get(key)],
        tiles=list(_tiles(steps, metrics, config)),
        settings=_settings(config),
        config=config_text,
        explained=rundir.explained.read_text(errors="replace") if rundir.explained.exists() else "",
        environment=_environment(rundir),
        sections=[(section, list(drawings)) for section, drawings in groupby(curves, lambda each: each.section)],
        events=events[-MAX_EVENTS:],
        num_events=len(events),
        samples=samples,
        # "<" cannot end the script element that it is in
        data=Markup(json.dumps(samples, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")),
        script=Markup(script),
        script_hash=digest,
        style=Markup(here.joinpath("report.css").read_text()),
    )


def _unit(metrics: Series) -> str:
    """What is counted: supervised fine-tuning logs by optimiser update."""
    return "step" if "rollout/reward" in metrics else "update"


def _leaves(config: str) -> dict[str, Any]:
    """Values of a YAML file by key path; empty when it is not YAML, so that the text at least is shown."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict | list) and value:
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from walk(item, f"{path}.{key}" if path else str(key))
        else:
            yield path, value

    try:
        return dict(walk(yaml.safe_load(config), ""))
    except yaml.YAMLError:
        return {}


def _settings(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        (path, value)
        for key in SETTINGS
        for path, value in config.items()
        if value is not None and (path == key or (key.endswith(".") and path.startswith(key)))
    ]


def _environment(rundir: RunDir) -> dict[str, Any]:
    """Readable lines of environment.json; empty without one."""
    try:
        about = json.loads(rundir.environment.read_text())
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
        git = about["git"]
        commit = f"{git['commit']}{' with uncommitted changes' if git['dirty'] else ''}" if git else None
        cpu, memory = about["cpu"], about["memory_bytes"]
        machine = [f"{cpu['count']} × {cpu['model']}", f"{memory / 2**30:.0f} GiB" if memory else ""]
        lines = {
            "started": about["started"],
            "command": " ".join(about["command"]),
            "commit": commit,
            "versions": versions,
            "machine": ", ".join(filter(None, [*machine, *about["cuda_devices"], about["platform"]])),
        }
        return {key: value for key, value in lines.items() if value}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # absent, or written by something else
        return {}


def _tiles(steps: Sequence[int], metrics: Series, config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What it came to: title, number, remark."""
    planned = config.get("run.num_steps")
    yield f"{_unit(metrics)}s", f"{steps[-1]:,}", f"of {planned:,}" if isinstance(planned, int) else ""
    shown = (
        ("reward", "rollout/reward", ".3f"),
        ("response length", "rollout/response_len/mean", ".1f"),
        ("loss", "train/loss", ".4g"),
        ("entropy", "train/entropy", ".3f"),
    )
    for title, name, format_ in shown:
        known = [value for value in metrics.get(name, ()) if value is not None]
        if known and not (name == "train/loss" and "rollout/reward" in metrics):  # beside a reward it says nothing
            yield title, format(known[-1], format_), f"from {format(known[0], format_)}"
    if tokens := sum(value or 0 for value in metrics.get("rollout/num_tokens", ())):
        yield "tokens sampled", f"{tokens:,.0f}", ""
    if seconds := sum(value or 0 for value in metrics.get("perf/step_s", ())):
        minutes = (
            f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min" if seconds >= 3600 else f"{seconds / 60:.1f} min"
        )
        yield (
            "time",
            minutes if seconds >= 60 else f"{seconds:.1f} s",
            f"{seconds / len(steps):.2f} s per line of metrics",
        )


# The samples


def _samples(rundir: RunDir, max_samples: int) -> dict[str, Any]:
    """What the script of the page shows; see there for its use."""
    sizes = {step: size for step in ledger.steps(rundir) if (size := ledger.num_rows(rundir, step))}
    shown = _spread(list(sizes), MAX_STEPS)
    groups = [Counter(ledger.read_step(rundir, step, ["group"])["group"].to_pylist()) for step in shown]
    largest = max((max(counts.values()) for counts in groups), default=1)
    shown = _spread(shown, max(1, min(MAX_STEPS, max_samples // largest)))
    rows = {step: _rows(rundir, step, max_samples // len(shown), MAX_TOKENS // len(shown)) for step in shown}
    cap = _cap([len(row["token_ids"]) - _start(row) for step in shown for row in rows[step]])
    pieces: dict[int, str] = {}
    prompts: dict[tuple[int, ...], int] = {}
    return {
        "num_samples": sum(sizes.values()),
        "num_shown": sum(map(len, rows.values())),
        "num_steps": len(sizes),
        "max_tokens": cap,
        "steps": [{"step": step, "groups": _groups(rows[step], cap, pieces, prompts)} for step in shown],
        "pieces": pieces,
        "prompts": [list(ids) for ids in prompts],
    }


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, evenly spaced, the first and the last among them (the last, when it is one)."""
    if count >= len(items):
        return list(items)
    return [items[-1]] if count == 1 else [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _rows(rundir: RunDir, step: int, max_rows: int, max_tokens: int) -> list[dict[str, Any]]:
    """The rows of some groups, whole where one fits in `max_rows`; of no more than one when that has `max_tokens`."""
    table = ledger.read_step(rundir, step)
    where: dict[int, list[int]] = {}
    for i, group in enumerate(table["group"].to_pylist()):
        where.setdefault(group, []).append(i)
    tokens_per_group = sum(map(len, table["token_ids"])) / len(where)
    by_rows = max_rows // max(map(len, where.values()))
    by_tokens = int(max_tokens / max(tokens_per_group, 1))
    chosen = [i for group in _spread(list(where), max(1, min(by_rows, by_tokens))) for i in where[group]]
    return table.take(chosen[:max_rows]).to_pylist(maps_as_pydicts="strict")


def _cap(lengths: Sequence[int]) -> int:
    """The most tokens of a response to show so that all fit in MAX_TOKENS."""
    cap = max(lengths, default=0)
    while sum(min(length, cap) for length in lengths) > MAX_TOKENS and cap > 1:
        cap //= 2
    return cap


def _start(row: Mapping[str, Any]) -> int:
    """Where the policy begins to write."""
    return next((t for t, version in enumerate(row["policy_versions"]) if version >= 0), len(row["token_ids"]))


def _groups(
    rows: Sequence[Mapping[str, Any]], cap: int, pieces: dict[int, str], prompts: dict[tuple[int, ...], int]
) -> list[dict[str, Any]]:
    groups: dict[int, dict[str, Any]] = {}
    for row in rows:
        shared = {name: row[name] for name in ("group", "prompt_id", "where", "rejected")}
        parsed = {name: json.loads(row[name] or "null") for name in ("messages", "reference", "metadata")}
        group = groups.setdefault(row["group"], {**shared, **parsed, "samples": []})
        start = _start(row)
        end = start + cap
        ids = row["token_ids"]
        pieces.update(zip(ids[:end], row["tokens"]))
        about = "index outcome error finish_reason stop_reason reward reward_parts trained update temperature"
        per_token = "logprobs old_logprobs current_logprobs ratios advantages clipped loss_weights policy_versions"
        sample = {name: row[name] for name in about.split()} | {
            "prompt": prompts.setdefault(tuple(ids[:start]), len(prompts)),
            "num_tokens": len(ids) - start,
            "token_ids": ids[start:end],
            **{name: _compact(row[name][start:end]) for name in per_token.split()},
        }
        group["samples"].append(finite(sample))
    return list(groups.values())


def _compact(values: list[Any]) -> Any:
    """One value where all are the same, None where there are none; floats to five digits."""
    short = [float(f"{value:.5g}") if isinstance(value, float) else value for value in values]
    if len(set(short)) == 1:
        return short[0]
    return [int(value) if isinstance(value, bool) else value for value in short] or None
