"""A reward process as the parent sees it: it can be killed at any moment, and another takes its place.

Not `multiprocessing`: its workers import the user's main script again, and with it torch. Not a pool library: the
limits hold per part of a sample, and a process killed while idle (out of memory) must not take the pool with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sluice.errors import RewardError
from sluice.rewards.spec import RewardSpec
from sluice.waits import Wait

START_LIMIT_S = 120.0
"""For importing the user's modules."""
START_TRIES = 3
"""Of a process that is killed while it starts: that is the machine's doing."""

_ENTRY = """\
import json, sys
sys.path[:] = json.loads(sys.argv.pop())
from sluice.rewards.worker import serve
serve(fd={fd}, parent={parent})
"""
_ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}


class PartError(Exception):
    """The part at `index` failed; the process is fine."""

    def __init__(self, index: int, what: str):
        super().__init__(what)
        self.index = index


class PartTimeout(PartError):
    """The part did not return in time; its process was killed."""


class WorkerDied(PartError):
    """The process died while it computed the part, by no doing of ours."""


class Worker:
    """One reward process. Threads wait for each other, except that `close` ends what another one waits for.

    What it prints goes to the file `log`, or nowhere.
    """

    def __init__(self, specs: Sequence[RewardSpec], log: Path | None = None):
        self._specs = tuple(specs)
        self._log = log
        self._path, self._folder = list(sys.path), os.getcwd()  # a replacement finds what the first one found
        self._process: subprocess.Popen[bytes] | None = None
        self._wait: Wait | None = None  # of the sample that it computes
        self._in_use = threading.RLock()
        self._lock = threading.Lock()  # no process may be spawned after `close`
        self._closed = False

    def start(self) -> None:
        """Returns when the process runs and has imported all it needs; at once when it does already.

        Raises RewardError when it cannot be started, with what it said.
        """
        with self._in_use:
            for tries_left in reversed(range(START_TRIES)):
                if self._process is not None and self._process.poll() is None:
                    return
                self._kill()
                self._spawn()
                self._greet(last=not tries_left)

    def _greet(self, last: bool) -> None:
        """Returns when the process is ready, or was killed and this was not the `last` try."""
        try:
            self._send(self._specs, START_LIMIT_S)
            ok, what = self._receive(START_LIMIT_S)
        except TimeoutError:
            ok, what = False, f"its imports did not end within {START_LIMIT_S:g} s"
        except (OSError, EOFError, pickle.UnpicklingError):
            what, killed = self._cause_of_death()
            if killed and not last:
                return
            ok, what = False, what + (f"; see {self._log}" if self._log else "")
        if not ok:
            self._kill()
            raise RewardError(f"a reward process could not start: {what}")

    def values(self, sample: bytes, wait: Wait) -> list[float | dict[str, float]]:
        """The value of every part, for a pickled (prompt, trajectory). `wait` is told which part is computed.

        Raises PartError, PartTimeout or WorkerDied for the first part that gives none, RewardError when none starts.
        """
        with self._in_use:
            self._wait = wait
            try:
                wait.at("reward process starting")
                self.start()
                return [self._value(index, spec, sample, wait) for index, spec in enumerate(self._specs)]
            finally:
                self._wait = None

    def status(self) -> str:
        """What it does at the moment, for people."""
        process, wait = self._process, self._wait
        name = f"process {process.pid}" if process else "no process"
        if wait is None:
            return f"{name}: idle"
        return f"{name}: {wait.stage.name} for {wait.name}, {wait.details}, for {time.monotonic() - wait.stage.since:.1f} s"

    def _value(self, index: int, spec: RewardSpec, sample: bytes, wait: Wait) -> float | dict[str, float]:
        wait.at(f"reward {spec.label}")
        try:
            if index == 0:
                self._send(sample, spec.timeout_s)
            ok, result = self._receive(spec.timeout_s)
        except TimeoutError:
            self._kill()
            what = f"did not return within {spec.timeout_s:g} s (timeout_s); its process was killed"
            raise PartTimeout(index, what) from None
        except (OSError, EOFError, pickle.UnpicklingError):
            raise WorkerDied(index, self._cause_of_death()[0]) from None
        if not ok:
            raise PartError(index, result)
        return result

    def close(self) -> None:
        """Kill the process; none is started again."""
        with self._lock:
            self._closed = True
        self._kill()

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        entry = _ENTRY.format(fd=theirs.fileno(), parent=os.getpid())
        with self._lock, theirs, contextlib.ExitStack() as undo, open(self._log or os.devnull, "ab") as output:
            undo.callback(ours.close)
            if self._closed:
                raise RewardError("the rubric was closed")
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-c", entry, json.dumps(self._path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._folder,
                env={**os.environ, **_ONE_THREAD},
                start_new_session=True,  # out of reach of the terminal's Ctrl-C; and a group that is killed as a whole
            )
            self._socket, self._pipe = ours, ours.makefile("rwb")
            undo.pop_all()

    def _send(self, message: Any, limit_s: float) -> None:
        self._socket.settimeout(limit_s)
        pickle.dump(message, self._pipe)
        self._pipe.flush()

    def _receive(self, limit_s: float) -> tuple[bool, Any]:
        self._socket.settimeout(limit_s)
        return pickle.load(self._pipe)

    def _cause_of_death(self) -> tuple[str, bool]:
        """As text, and whether a signal ended it: then it was no doing of the user's code, as far as one can know."""
        process = self._process
        if process is None:
            return "the rubric was closed", False
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        code = process.returncode
        self._kill()
        if code is None:
            return "its process closed its connection to sluice", False
        if code >= 0:
            return f"its process ended with exit code {code}", False
        hint = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        return f"its process was killed ({signal.Signals(-code).name}{hint})", True

    def _kill(self) -> None:
        """Kill the process and all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # should it have left its group
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5.0)
        with contextlib.suppress(OSError):
            self._pipe.close()
        self._socket.close()
