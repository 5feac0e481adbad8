"""A small run of the real thing in a process of its own: a tiny copy of the model, two samples, one update.

The process has a time limit, and a place of its own for all that it writes. What it leaves there is read afterwards.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from sluice.config import SftConfig, TrainConfig
from sluice.configengines import ServerEngine
from sluice.data.prompts import SftSet
from sluice.preflight.findings import Item
from sluice.tracking.ledger import read_step
from sluice.tracking.rundir import RunDir, read_lines

START_LIMIT_S, LIMIT_S = 120, 120
"""For importing torch and making the model, and for the run."""
KILLED_AFTER_S = 15
"""After the limits, should the process not end itself, and say where it was."""
MAX_NEW_TOKENS = 16
ATTEMPT_LIMIT_S = 45.0
"""Longest attempt at a prompt here, whatever rollout.timeout_s allows."""
SFT_ROWS = 2
RUN = "trial"


class Trial:
    """Starts at once; `result` waits for its end. As a context it leaves neither process nor folder behind."""

    def __init__(self, config: TrainConfig | SftConfig, pairs: SftSet | None = None) -> None:
        """`pairs` are the rows of an SFT config."""
        self._config = config
        self._folder = tempfile.TemporaryDirectory(prefix="sluice-check-", ignore_cleanup_errors=True)
        self._path = Path(self._folder.name)
        small = _small_sft(config, pairs, self._path) if isinstance(config, SftConfig) else _small_training(config)
        small["run"] = (small.get("run") or {}) | {"folder": str(self._path / "runs"), "name": RUN}
        (self._path / "trial.yaml").write_text(yaml.safe_dump(small))
        self._start = time.monotonic()
        kind = "sft" if isinstance(config, SftConfig) else "train"
        with open(self._path / "output", "wb") as output:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "sluice.preflight.tiny",
                    kind,
                    str(self._path),
                    str(START_LIMIT_S),
                    str(LIMIT_S),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # killed as a group, and out of reach of the terminal's Ctrl-C
            )

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(KILLED_AFTER_S)
        self._folder.cleanup()

    def result(self) -> Item:
        item = Item("trial")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(START_LIMIT_S + LIMIT_S + KILLED_AFTER_S)
        ended = self._path / "ended.json"
        if not ended.exists():
            item.fail(self._death())
            return item
        end: dict[str, Any] = json.loads(ended.read_text())
        if end["error"] is None:
            self._judge_run(item, end)
        elif end["kind"] == "NotShrinkable":
            item.warn(
                f"no tiny copy of the model could be made ({end['error']}), so a rollout and an update were not tried; "
                "the first step of the run will show"
            )
        else:
            self._judge_error(item, end)
        return item

    def _judge_run(self, item: Item, end: dict[str, Any]) -> None:
        run = RunDir(self._path / "runs" / RUN)
        what = "one update" if isinstance(self._config, SftConfig) else "two samples, one update"
        seconds = time.monotonic() - self._start
        item.summary = f"{what} and a checkpoint with {end['model']}, {seconds:.0f} s after its start"
        if isinstance(self._config, TrainConfig) and isinstance(self._config.engine, ServerEngine):
            item.note(f"the embedded engine sampled in place of engine.name={self._config.engine.name}")
        for event in read_lines(run.events) if run.events.exists() else []:
            if event["kind"] != "prompt_skipped":
                item.warn(f"{event['message']} ({event['kind']})")

    def _judge_error(self, item: Item, end: dict[str, Any]) -> None:
        """A random model may well earn no score or be kept by no filter; what fails whatever it says is a failure."""
        outcomes = self._outcomes() if end["kind"] == "RolloutError" else []
        patient = isinstance(self._config, TrainConfig) and self._config.rollout.timeout_s > ATTEMPT_LIMIT_S
        if "scored" in outcomes:
            item.warn(f"with a random model nothing was left to train on: {end['error']}")
        elif outcomes and set(outcomes) == {"timeout"} and patient:
            item.warn(f"an attempt took longer than {ATTEMPT_LIMIT_S:g} s, and was not waited for: {end['error']}")
        else:
            item.fail(end["error"])

    def _outcomes(self) -> list[str]:
        """Of all attempts of the step that could not be filled."""
        run = RunDir(self._path / "runs" / RUN)
        if not list(run.ledger.glob("*.parquet")):
            return []
        return read_step(run, 1, ["outcome"]).column("outcome").to_pylist()

    def _death(self) -> str:
        """What ended the process before it could say so."""
        output = (self._path / "output").read_text(errors="replace")
        where = ""
        if frames := re.findall(r'^  File "(.+?)", line (\d+)', output, re.MULTILINE):
            own = [frame for frame in frames if "/sluice/" not in frame[0] and "/lib/python" not in frame[0]]
            where = " at {}:{}".format(*(own or frames)[0])
        if "Timeout (" in output:
            return f"no end within {LIMIT_S} s; it was{where}. See that no call waits for ever"
        code = self._process.poll()
        if code is None:
            return f"no end within {START_LIMIT_S + LIMIT_S} s, and it would not end itself; it was killed"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        last = output.strip().splitlines()[-1:]
        return f"its process {how}{where}" + (f": {last[0]}" if last else "")


def _small_training(config: TrainConfig) -> dict[str, Any]:
    """The config as it was set, but small. (What was left out stays out: some settings are refused where they do nothing.)"""
    set_by_user = config.model_dump(mode="json", exclude_unset=True)
    rollout = {
        "groups_per_step": 1,
        "group_size": 2,
        "max_new_tokens": min(config.rollout.max_new_tokens, MAX_NEW_TOKENS),
        "timeout_s": min(config.rollout.timeout_s, ATTEMPT_LIMIT_S),
        "max_rejected_groups": 4,
        "max_failed_groups": 2,
        "environment_workers": min(config.rollout.environment_workers, 1),
    }
    changes: dict[str, dict[str, Any]] = {
        "run": {"num_steps": 1, "stop_at_reward": None},
        "rollout": rollout,
        "trainer": {"name": config.trainer.name, "updates_per_batch": 1},
        "algorithm": {"dynamic_sampling": False},
        "checkpoint": {"every_steps": None},
        "checks": {"outcome_budget": "warn"},  # a random model may well have no score
    }
    if config.trainer.name == "fsdp":  # of a model too small to be divided
        changes["trainer"] |= {"num_ranks": 1, "tensor_parallel": 1, "context_parallel": 1}
    if config.checks.outcome_budget == "off":
        del changes["checks"]
    if config.engine.name == "embedded":
        changes["engine"] = {"name": "embedded", "num_slots": 2}
    if "critic" in set_by_user:
        changes["critic"] = {"pretrain_steps": 0}
    if config.reference.update_every_steps:
        changes["reference"] = {"update_every_steps": 1}
    small = set_by_user | {key: set_by_user.get(key, {}) | change for key, change in changes.items()}
    small.pop("placement", None)  # its files are on this machine
    if isinstance(
        config.engine, ServerEngine
    ):  # which takes a minute to start, and may not take the tiny model's shapes
        apart = {"process": "own"} if config.rollout.max_staleness else {}
        small["engine"] = {"name": "embedded", "num_slots": 2, **apart}
    return small | {"reward_workers": 1}


def _small_sft(config: SftConfig, pairs: SftSet | None, folder: Path) -> dict[str, Any]:
    assert pairs is not None
    rows: Sequence[Any] = [pairs[i] for i in range(min(SFT_ROWS, len(pairs)))]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": r.messages, "response": r.response}) + "\n" for r in rows))
    small = config.model_dump(mode="json", exclude_unset=True)
    small["data"] = {"path": str(data)}
    small["run"] = small.get("run", {}) | {"num_epochs": 1, "log_every": 1}
    small["trainer"] = small.get("trainer", {}) | {"samples_per_update": SFT_ROWS}
    return small
