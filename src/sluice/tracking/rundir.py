"""The folder of a run: what lies where, and writes that leave nothing half-written."""

from __future__ import annotations

import errno
import importlib.metadata
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from sluice.errors import ConfigError, DataError, RunFolderError

GIT_TIMEOUT_S = 10
BEFORE_CONFIG = {".lock", "environment.json", "explained.txt"}
"""What a process leaves that was killed before its run began."""
_APPENDING = threading.Lock()


@dataclass(frozen=True)
class RunDir:
    """The layout of a run folder, which viewers and users' own scripts rely on."""

    path: Path

    @classmethod
    def create(cls, folder: str | Path, name: str, adopt: bool = False) -> RunDir:
        """Make the run folder `folder/name`. Of several processes that try at once, one succeeds.

        Raises ConfigError when it cannot be made, or exists already and is not one to `adopt`: one without a config, whose
        process was killed before there was anything.
        """
        path = Path(folder) / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()  # the operating system makes sure that only one process succeeds
        except FileExistsError as error:
            if adopt and path.is_dir() and {entry.name for entry in path.iterdir()} <= BEFORE_CONFIG:
                return cls(path)
            if error.filename != str(path):  # the parent is a file
                raise ConfigError(f"cannot make the run folder {path}: {error.filename} is not a folder") from None
            raise ConfigError(
                f"the run folder {path} exists already, and was left as it is; "
                + (
                    f"to go on with that run: sluice train --resume {path}; to begin another, choose another name with run.name=…"
                    if cls(path).config.exists()
                    else "choose another name with run.name=…, or remove the folder"
                )
            ) from None
        except OSError as error:
            raise ConfigError(
                f"cannot make the run folder {path}: {error.strerror}; choose another place with run.folder=…"
            ) from None
        return cls(path)

    @classmethod
    def create_stamped(cls, folder: str | Path, stem: str) -> RunDir:
        """Make the run folder `folder/STEM-TIME`, with a number behind it where the clock has shown that time before."""
        for name in _stamped(stem):
            try:
                return cls.create(folder, name)
            except ConfigError:
                if not (Path(folder) / name).exists():
                    raise
        raise AssertionError("there is always a next name")

    @property
    def config(self) -> Path:
        """The resolved config, with the origin of each value; the first file of a run that is there to stay."""
        return self.path / "config.yaml"

    @property
    def explained(self) -> Path:
        """The batch arithmetic and the loss in plain words, as `sluice config explain` prints them; absent after supervised runs."""
        return self.path / "explained.txt"

    @property
    def environment(self) -> Path:
        """What it ran on: see `describe_environment`."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """A line per logged step: `{"step": n, name: number or null, …}`."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """A line per event: `{"time": …, "kind": …, "message": …, "details": {…}}`; absent when nothing happened."""
        return self.path / "events.jsonl"

    @property
    def ledger(self) -> Path:
        """Folder with every sample of every step: see `sluice.tracking.ledger`; absent after supervised runs."""
        return self.path / "ledger"

    @property
    def checkpoints(self) -> Path:
        """Folder with a model folder per checkpoint."""
        return self.path / "checkpoints"

    @property
    def stacks(self) -> Path:
        """Where the stacks of all threads go at once on SIGUSR1, whatever the process does; empty until then."""
        return self.path / "stacks.txt"

    def create_dump(self) -> Path:
        """A new and empty `dump-TIME.txt`; none is ever written over, whatever the clock says."""
        for name in _stamped("dump"):
            path = self.path / f"{name}.txt"
            with suppress(FileExistsError):
                path.touch(exist_ok=False)
                return path
        raise AssertionError("there is always a next name")

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_folders(self) -> list[Path]:
        """In the order of their steps; unfinished ones, and what else lies there, are none."""
        names = {path.name.removeprefix("step-"): path for path in self.checkpoints.glob("step-*")}
        return [names[step] for step in sorted((n for n in names if n.isdecimal()), key=int)]

    @property
    def report(self) -> Path:
        """The run on one page."""
        return self.path / "report.html"


def _stamped(stem: str) -> Iterator[str]:
    """STEM-TIME, then STEM-TIME-2, and so on: clocks are set back, and two may ask within a second."""
    first = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    yield first
    yield from (f"{first}-{number}" for number in itertools.count(2))


def finite(value: Any) -> Any:
    """The value with None for every number that JSON cannot say (nan, inf), at any depth."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
    return value


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one line of JSON and return when it is on disk; nan and inf become null, other objects their text.

    Whenever the process dies, all lines before are whole. For one writing process, and any of its threads. Raises OSError when the disk is full.
    """
    line = json.dumps(finite(record), allow_nan=False, default=str).encode() + b"\n"
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        with _APPENDING:  # a half-written line of another thread is not a torn one
            _cut_torn_line(file)
            if os.write(file, line) < len(line):
                raise OSError(errno.ENOSPC, "disk full: only part of a line was written", str(path))
        os.fsync(file)
    finally:
        os.close(file)


def _cut_torn_line(file: int) -> None:
    """Remove what a killed writer left after the last newline: a line appended to it would be lost with it."""
    end = os.fstat(file).st_size
    if end == 0 or os.pread(file, 1, end - 1) == b"\n":
        return
    os.ftruncate(file, os.pread(file, end, 0).rfind(b"\n") + 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, without a torn last line (one that has no newline).

    Raises DataError for a file that cannot be read, and for a line that is no JSON object, naming file and line.
    """
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return [_record(path, number, line) for number, line in enumerate(lines, start=1)]


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:  # no JSON, or no UTF-8
        raise DataError(f"{path}:{number}: not a line of JSON ({error}); remove the line to read the rest") from None
    if not isinstance(record, dict):
        raise DataError(f"{path}:{number}: not a JSON object but {type(record).__name__}; remove the line")
    return record


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file, or call `content` with it open for writing, so that `path` is only ever the old or the new whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)  # the rename itself


def sync_folder(path: Path) -> None:
    """Bring to disk which files there are in a folder."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


T = TypeVar("T")
DISK_POLL_S = 1.0


def patiently(write: Callable[[], T], what: str, wait_s: float, tell: Callable[[str], None]) -> T:
    """Write, and as long as the disk is full, for at most `wait_s`, tell so once and try again.

    `write` leaves nothing behind when it fails. Raises RunFolderError in the end, and at once whatever else goes wrong.
    """
    end, told = time.monotonic() + wait_s, False
    while True:
        try:
            return write()
        except Exception as error:
            if not is_disk_full(error):
                raise
            if time.monotonic() >= end:
                raise RunFolderError(
                    f"{what} could not be written within {wait_s:g} s (run.disk_wait_s): the disk is full ({error}); make room, "
                    "then go on with: sluice train --resume RUN_FOLDER"
                ) from error
            if not told:
                tell(f"{what} waits for room on the disk, for at most {wait_s:g} s (run.disk_wait_s): {error}")
            told = True
            time.sleep(min(DISK_POLL_S, wait_s))


def is_disk_full(error: BaseException) -> bool:
    """The libraries that write weights and tokenisers are not written in Python and pass the reason on as text only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
        return True
    before = error.__cause__ or error.__context__  # torch raises another error while it cleans up after the first
    return before is not None and is_disk_full(before)


def describe_environment() -> dict[str, Any]:
    """What decides whether a run can be repeated: versions, machine, commit, command. No secrets: no other variables."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "git": _git(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("sluice", "torch", "transformers", "pydantic", "pyarrow")},
        },
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "count": os.cpu_count()},
        "memory_bytes": _memory_bytes(),
        "cuda_devices": _cuda_devices(),
        "variables": {name: os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the current folder, and whether tracked files differ from it; None outside a repository."""
    try:
        commit = _git_says("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git_says("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git_says(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True)
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every platform knows
        return None


def _cuda_devices() -> list[str]:
    """Empty until torch is loaded: this module does not load it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
