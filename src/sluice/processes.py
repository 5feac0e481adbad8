"""Processes of our own code: at the other end of a socket, gone when we are gone, and killed with all that they started.

Not `multiprocessing`: its workers import the user's main script again, and with it torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from sluice.errors import EngineError, PlacementError, SluiceError

ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
"""Variables of processes of which there are many."""
_PARENT_CHECK_S = 0.5
_PR_SET_PDEATHSIG = 1
_ENTRY = """\
import json, sys
sys.path[:] = json.loads(sys.argv.pop())
from sluice.processes import Parent
from {module} import serve
serve({fd}, {parent})
"""


@dataclass(frozen=True)
class Parent:
    """As its child knows it."""

    pid: int
    lifeline: int
    """Descriptor of the child's own pipe, whose other end it holds, and writes nothing to."""


class Died(SluiceError):
    """The process did, before it answered."""


def start_failure(error: BaseException, number: int, what: str, see: str) -> BaseException:
    """What is to be raised when an engine's process of that number, from 1, did not start: `Died` where it may well start the next time."""
    if (
        isinstance(error, PlacementError) and number > 1
    ):  # it did start once: its machine may be lost, or be full for a while
        return Died(str(error))
    is_told = isinstance(error, SluiceError) and not isinstance(error, Died)
    return EngineError(f"{what}: {error}{see}") if is_told else error


class Child(Protocol):
    """A process of our own code, on this machine or on another."""

    def connect(self) -> socket.socket:
        """The connection to it, once there is one; may wait, and is called once. Raises Died when the process dies meanwhile, and
        another SluiceError when it cannot be started."""
        ...

    def is_running(self) -> bool: ...

    def cause_of_death(self) -> tuple[str, bool]:
        """As text, and whether a signal ended it: then it was no doing of its code, as far as one can know. It is killed if it
        has not ended."""
        ...

    def kill(self) -> None:
        """With all that it started; ends a `connect` that waits."""
        ...


class Launch(Protocol):
    """Starts one, and does not wait for it. Its module has `serve(fd: int, parent: Parent)`, which calls `belong_to(parent, fd)` first and talks
    through the socket `fd`. What it prints goes to the file `log`, or nowhere."""

    def __call__(
        self, module: str, *, path: Sequence[str], folder: str, log: Path | None, variables: Mapping[str, str]
    ) -> Child:
        """`path` is its `sys.path`, `folder` where it runs."""
        ...


class Process:
    """A child on this machine."""

    def __init__(
        self,
        module: str,
        *,
        path: Sequence[str],
        folder: str,
        log: Path | None,
        variables: Mapping[str, str],
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.socket, theirs = socket.socketpair()
        try:
            with theirs, open(log or os.devnull, "ab") as output:
                self._process = spawn(module, theirs, output.fileno(), path, folder, variables, pass_fds)
        except BaseException:
            self.socket.close()
            raise

    def __str__(self) -> str:
        return f"process {self.pid}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def connect(self) -> socket.socket:
        return self.socket

    def is_running(self) -> bool:
        return self._process.poll() is None

    def cause_of_death(self) -> tuple[str, bool]:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        code = self._process.returncode
        self.kill()
        return cause_of(code)

    def kill(self) -> None:
        kill_group(self._process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        self.socket.close()


def spawn(
    module: str,
    connection: socket.socket,
    output: int,
    path: Sequence[str],
    folder: str,
    variables: Mapping[str, str],
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """A process of this one that runs `serve` of the module over the connection, and prints to the descriptor `output`."""
    lifeline, held = os.pipe()  # of this child alone: older kernels tell all readers of a pipe when one is gone
    entry = _ENTRY.format(module=module, fd=connection.fileno(), parent=Parent(os.getpid(), lifeline))
    try:
        process = _started(entry, output, [connection.fileno(), lifeline, *pass_fds], path, folder, variables)
    except BaseException:
        os.close(held)
        raise
    finally:
        os.close(lifeline)
    weakref.finalize(process, os.close, held)
    return process


def _started(
    entry: str, output: int, pass_fds: Sequence[int], path: Sequence[str], folder: str, variables: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-u", "-c", entry, json.dumps(list(path))],
        pass_fds=pass_fds,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd=folder,
        env={**os.environ, **variables},
        start_new_session=True,  # out of reach of the terminal's Ctrl-C; and a group that is killed as a whole
    )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """The process with all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # should it have left its group


def cause_of(code: int | None) -> tuple[str, bool]:
    """What `Child.cause_of_death` says of an exit code; None: it has not ended."""
    if code is None:
        return "its process closed its connection to sluice", False
    if code >= 0:
        return f"its process ended with exit code {code}", False
    hint = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
    return f"its process was killed ({signal.Signals(-code).name}{hint})", True


def kill_own_group() -> None:
    """This process, and whatever it has started."""
    os.killpg(0, signal.SIGKILL)


def belong_to(parent: Parent, fd: int, end: Callable[[], None] = kill_own_group) -> socket.socket:
    """In the process itself, first of all: when its parent is gone it calls `end`, and it leaves Ctrl-C to it. Gives the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # of which one dies, and which a careless `pkill` may send here too
        faulthandler.register(signal.SIGUSR1)  # says in the log where it is
    threading.Thread(target=_end_with, args=(parent.pid, end), daemon=True).start()
    if end is kill_own_group:
        _be_killed_by(parent.lifeline)
    else:
        _wake_with_parents_death()
    sys.stdout, sys.stderr = (_Output(stream.fileno()).as_text() for stream in (sys.stdout, sys.stderr))
    os.set_inheritable(fd, False)
    # with a child that lives on, the parent would not see that this process has ended
    os.register_at_fork(after_in_child=partial(_close_in_place, fd, os.fstat(fd).st_ino))
    return socket.socket(fileno=fd)


class _Output(io.FileIO):
    """What is printed to a file on a full disk is lost, and no error of who printed it."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return memoryview(data).nbytes

    def as_text(self) -> io.TextIOWrapper:
        """By whole lines, between which others may print to the same file."""
        return io.TextIOWrapper(self, "utf-8", "backslashreplace", line_buffering=True)  # pyright: ignore[reportArgumentType]


def _close_in_place(fd: int, inode: int) -> None:
    """If it is that file still; whoever closes it once more closes nothing else."""
    with contextlib.suppress(OSError), open(os.devnull) as nothing:
        if os.fstat(fd).st_ino == inode:
            os.dup2(nothing.fileno(), fd, inheritable=False)


def own_address(pipe: socket.socket) -> str:
    """Of this machine, as whoever is at the other end sees it."""
    return "127.0.0.1" if pipe.family == socket.AF_UNIX else pipe.getsockname()[0]


def address_towards(host: str) -> str:
    """Of this machine, as a machine of that name sees it. Raises OSError when there is no way to it."""
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # by which nothing is sent
        return probe.getsockname()[0]


def _wake_with_parents_death() -> None:
    """On Linux: one that was stopped (SIGSTOP) goes on when its parent dies, and so can tidy up and end. It does as well when only the
    thread ends that started it: the kernel takes that for its parent."""
    with contextlib.suppress(AttributeError, OSError):  # another system
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


def _be_killed_by(lifeline: int) -> None:
    """On Linux: this process and all that it started, by the kernel, when the parent is gone. No thread of ours runs while C code holds
    the interpreter, as a regular expression does that finds no end."""
    os.set_inheritable(lifeline, False)
    with contextlib.suppress(AttributeError, OSError):  # another system
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)


def _end_with(parent: int, end: Callable[[], None]) -> None:
    """By looking, and not by the end of file alone, which who is busy does not read."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    end()
