"""Small runs through the command line: what they need in their folder, and what they leave there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from conftest import ROOT
from makers import make_char_tokenizer
from models import CONFIGS, tiny_model
from sluice.cli import main

ALPHABET = "".join(map(chr, [*range(32, 127), *range(0xA1, 0xA1 + 31)]))
"""126 characters: with <pad> and <eos> as many tokens as the tiny models have."""

DRY_ONLY = "train/loss_tokens"
"""The one metric of the dry trainer, which no other has."""

REWARDS = """\
def share_of_a(prompt, trajectory):
    return trajectory.response.count("a") / max(1, trajectory.num_response_tokens)


def share_of_small_letters(prompt, trajectory):
    return sum(c.islower() for c in trajectory.response) / max(1, trajectory.num_response_tokens)
"""


@contextmanager
def workplace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`folder` as the current one; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file may be rewritten within the second
    yield folder
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(f"{folder}/"):
            del sys.modules[name]


def sluice(*words: str | Path) -> int:
    """The exit code of `sluice WORDS`, run in this process."""
    try:
        return main([str(word) for word in words])
    except SystemExit as stopped:  # argparse
        return int(stopped.code or 0)


def started(*words: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
    """`sluice WORDS` as a process of its own, to be killed or waited for."""
    command = [Path(sys.executable).with_name("sluice"), *words]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(command: str, *words: str | Path, name: str = "test") -> Path:
    """Run `sluice train` or `sluice sft` to its good end; gives the run folder."""
    assert sluice(command, *words, f"run.name={name}", "run.num_threads=1") == 0
    return Path("runs") / name


def make_model(folder: str | Path, architecture: str = "qwen3", scale: float = 4.0) -> Path:
    """A random model of 128 tokens and its tokeniser, without a chat template."""
    tiny_model(architecture, scale=scale).model.save_pretrained(folder)
    return make_char_tokenizer(folder, ALPHABET)


def make_architecture(folder: str | Path, alphabet: str, **changes: Any) -> Path:
    """A tokeniser and a Qwen3 without weights, for `model.random_weights`."""
    config = CONFIGS["qwen3"]()
    config.update({"vocab_size": 2 + len(alphabet), "bos_token_id": None, **changes})
    config.save_pretrained(folder)
    return make_char_tokenizer(folder, alphabet)


def make_stand_in_python(path: Path) -> Path:
    """A Python whose vLLM and SGLang are stand-ins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}/tests/standins:$PYTHONPATH" exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def write_rows(path: str | Path, rows: Sequence[dict[str, Any]]) -> Path:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(path)


def write_config(path: str | Path = "config.yaml", **sections: Any) -> Path:
    """A train config over prompts.jsonl and model/, small; `sections` replace those of the same name."""
    config = {
        "model": {"path": "model"},
        "data": {"path": "prompts.jsonl"},
        "rollout": {"groups_per_step": 4, "group_size": 4, "max_new_tokens": 8},
        "rewards": [{"name": "users_code:share_of_small_letters"}],
        "trainer": {"learning_rate": 1e-3},
        "run": {"num_steps": 3, "num_threads": 1},
    }
    Path(path).write_text(yaml.safe_dump({**config, **sections}, sort_keys=False))
    return Path(path)


def set_up(folder: Path, architecture: str = "qwen3") -> None:
    """config.yaml, model/, prompts.jsonl and users_code.py in `folder`, ready for `sluice train config.yaml`."""
    make_model(folder / "model", architecture)
    write_rows(
        folder / "prompts.jsonl", [{"prompt": f"task {i}: {'x' * (i % 5)}", "answer": str(i)} for i in range(20)]
    )
    (folder / "users_code.py").write_text(REWARDS)
    write_config(folder / "config.yaml")


def metrics_of(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, each a whole JSON object."""
    text = (run / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def events_of(run: Path) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ledger_of(run: Path, step: int) -> list[dict[str, Any]]:
    """The rows of a step."""
    return pq.read_table(run / "ledger" / f"step-{step:06d}.parquet").to_pylist(maps_as_pydicts="strict")


def without_timings(lines: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def documented_metrics(some_runs: bool = False) -> set[str]:
    """The names in the tables of docs/howto.md, of the metrics of every run or of those that `some_runs` have.

    `/max` after `a/mean` is `a/max`, and `share/*` stands for all intervals of `train/ratio/share`.
    """
    page = (ROOT / "docs/howto.md").read_text()
    tables = re.findall(r"^\| metric \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    every, some = (_first_cells(table) for table in tables)
    assert len(every) > 15, "the table was not found"
    if not some_runs:
        return every
    intervals = {name.rpartition("/")[2] for name in every if name.startswith("train/ratio/share/")}
    return {
        expanded for name in some for expanded in ({name[:-1] + i for i in intervals} if name[-1] == "*" else {name})
    }


def _first_cells(table: str) -> set[str]:
    names: set[str] = set()
    for row in table.splitlines():
        last = ""
        for name in re.findall(r"`(.+?)`", row.split(" | ")[0]):
            last = last.rpartition("/")[0] + name if name.startswith("/") else name
            names.add(last)
    return names
