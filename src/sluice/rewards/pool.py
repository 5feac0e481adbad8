"""A reward process as the parent sees it: it can be killed at any moment, and another takes its place.

Not a pool library: the limits hold per part of a sample, and a process killed while idle (out of memory) must not take the
pool with it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from sluice.errors import RewardError, SluiceError
from sluice.processes import ONE_THREAD, Child, Died, Launch, Process
from sluice.rewards.spec import RewardSpec
from sluice.waits import Wait

START_LIMIT_S = 120.0
"""For importing the user's modules."""
START_TRIES = 3
"""Of a process that is killed while it starts: that is the machine's doing."""


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

    What it prints goes to the file `log`, or nowhere; `launch` starts it somewhere.
    """

    def __init__(self, specs: Sequence[RewardSpec], log: Path | None = None, launch: Launch = Process):
        self._specs = tuple(specs)
        self._log = log
        self._launch = launch
        self._path, self._folder = list(sys.path), os.getcwd()  # a replacement finds what the first one found
        self._process: Child | None = None
        self._pipe: Any = None
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
                if self._process is not None and self._process.is_running():
                    return
                self._kill()
                self._spawn()
                self._greet(last=not tries_left)

    def _greet(self, last: bool) -> None:
        """Returns when the process is ready, or was killed and this was not the `last` try."""
        try:
            self._connect()
            self._send(self._specs, START_LIMIT_S)
            ok, what = self._receive(START_LIMIT_S)
        except TimeoutError:
            ok, what = False, f"its imports did not end within {START_LIMIT_S:g} s"
        except (OSError, EOFError, pickle.UnpicklingError, Died) as error:
            cause, killed = self._cause_of_death()
            if killed and not last:
                return
            cause = str(error) if isinstance(error, Died) else cause
            ok, what = False, cause + (f"; see {self._log}" if self._log else "")
        except SluiceError as error:
            ok, what = False, str(error)
        if not ok:
            self._kill()
            if self._closed:
                raise RewardError("the rubric was closed")
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
        name = str(process) if process else "no process"
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
        with self._lock:
            if self._closed:
                raise RewardError("the rubric was closed")
            self._process = self._launch(
                "sluice.rewards.worker", path=self._path, folder=self._folder, log=self._log, variables=ONE_THREAD
            )

    def _connect(self) -> None:
        if self._process is None:
            raise RewardError("the rubric was closed")
        self._socket = self._process.connect()
        self._pipe = self._socket.makefile("rwb")

    def _send(self, message: Any, limit_s: float) -> None:
        with self._within(limit_s):
            pickle.dump(message, self._pipe)
            self._pipe.flush()

    def _receive(self, limit_s: float) -> tuple[bool, Any]:
        with self._within(limit_s):
            return pickle.load(self._pipe)

    @contextlib.contextmanager
    def _within(self, seconds: float) -> Generator[None]:
        """Raises TimeoutError when it takes longer, EOFError after `close` and where the process's machine was lost."""
        if self._process is None:
            raise EOFError
        self._socket.settimeout(seconds)
        try:
            yield
        except TimeoutError as error:
            if error.errno:  # by the system, which no longer reaches the machine
                raise EOFError from None
            raise

    def _cause_of_death(self) -> tuple[str, bool]:
        """As `Process.cause_of_death`."""
        process = self._process
        what = process.cause_of_death() if process else ("the rubric was closed", False)
        self._kill()
        return what

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                self._pipe.close()
