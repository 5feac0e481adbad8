"""Sides that run in processes of their own, since they want another environment: each answers a line with a line.

A child stays alive between its turns and does nothing in them, so that sides in different processes are timed in turn as
those in one process are. Standard library only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

Message = dict[str, Any]


class ChildFailed(Exception):
    """It ended without an answer; with the last lines that it printed."""


class Child:
    """`command` as a process that serves; `first` is what it said when it was ready."""

    def __init__(self, command: Sequence[str | Path], threads: int, **variables: str) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the child is there
        fixed = {"GOMP_SPINCOUNT": "1000", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [str(word) for word in command],
            env=os.environ | fixed | {"OMP_NUM_THREADS": str(threads)} | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        try:
            self.first = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> Message:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # that it has ended, and why, is said by the answer that does not come
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Message:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            tail = "".join(self._log.readlines()[-15:])
            raise ChildFailed(f"{self._process.args} ended with code {code}:\n{tail}")
        return json.loads(line)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            with suppress(BrokenPipeError):
                pipe.close()
        end(self._process)
        self._log.close()


def end(process: subprocess.Popen[Any]) -> None:
    """Wait for a process that leads a session and was asked to end, and leave none of those that it started."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Served:
    """The child's end. Whatever libraries print goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def next(self, answer: Message) -> Message | None:
        """Give the answer and wait for the next request; None when there will be none."""
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()
        line = sys.stdin.readline()
        return json.loads(line) if line else None


def resident_mib(what: Literal["VmRSS", "VmHWM"]) -> float:
    """Memory of this process: what it has now, or the most since it began or since `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class StepClock:
    """Called wherever a training step begins: times the steps, and after as many as were asked for waits for the next request.

    A step ends where the next one begins, so that everything in between counts: logging, the data loader, checkpoints. An
    answer tells the seconds of each step, where they went, and the most memory since the first step began.
    """

    def __init__(self, served: Served, first: Message, split: Callable[[int], dict[str, float]]) -> None:
        """`split` says of the last n steps how many seconds of each went where, in the mean."""
        self._served, self._answer, self._split = served, first, split
        self._seconds: list[float] = []
        self._wanted = 0
        self._start: float | None = None

    def __call__(self) -> None:
        if self._start is None:
            self._answer |= {"resident_mib": resident_mib("VmRSS")}
            forget_peak()
        else:
            self._seconds.append(time.perf_counter() - self._start)
        if len(self._seconds) == self._wanted:
            if self._wanted:
                split = self._split(self._wanted)
                self._answer = {"seconds": self._seconds, "split": split, "peak_mib": resident_mib("VmHWM")}
            request = self._served.next(self._answer)
            if request is None:
                os._exit(0)  # the training has steps left, and this is in the middle of it
            self._seconds, self._wanted = [], request["steps"]
        self._start = time.perf_counter()
