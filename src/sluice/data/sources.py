"""Rows of a JSONL file, a Parquet file or a Hugging Face dataset folder, read by number and named by place."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from sluice.errors import ConfigError, DataError, boundary

Row = dict[str, Any]

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
HF_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")
FORMATS = (
    "a JSONL file (.jsonl, .json, .ndjson), a Parquet file (.parquet) or a folder written by datasets.save_to_disk"
)


class Rows(Protocol):
    """A table that is read row by row."""

    name: str
    """File stem or folder name (and split); generated prompt ids begin with it."""
    path: Path
    fingerprint: str
    """Hash of the files' bytes: the same wherever and whenever the data is copied."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that there are. JSONL has no schema: those of its first rows."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Row:
        """Raises IndexError out of range, and DataError with file and line for a row that cannot be read."""
        ...

    def where(self, i: int) -> str:
        """`file:line` for JSONL, `file row N` (from 1) for the others."""
        ...

    def changed(self) -> str:
        """Which file has other content than when it was opened; empty when none has."""
        ...


def open_rows(path: str, format: str = "auto", split: str | None = None) -> Rows:
    """Open the data at `path`; `format` is auto, jsonl, parquet or hf.

    Raises DataError where there is nothing that can be read, and ConfigError where `format` or `split` do not fit it.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(_not_there(place))
    kind = _format_at(place) if format == "auto" else format
    if kind == "hf":
        rows: Rows = HfRows(place, split)
    elif kind in ("jsonl", "parquet"):
        if split is not None:
            raise ConfigError(f"data.split={split} has no effect: {place} is a single file; leave it out")
        if not place.is_file():
            raise DataError(f"{place} is a folder, and data.format={kind} reads a file; name the file in it")
        rows = JsonlRows(place) if kind == "jsonl" else ParquetRows(place)
    else:
        raise ConfigError(f"data.format={kind} is not known; it is one of auto, jsonl, parquet, hf")
    if not len(rows):
        raise DataError(f"{place} has no rows")
    return rows


class _Files:
    """The files that a table is read from."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._seen = {path: _stat(path) for path in paths}
        self._contents = {path: _content(path) for path in self._seen}
        self.fingerprint = hashlib.blake2b(b"".join(self._contents.values()), digest_size=16).hexdigest()

    def changed(self) -> str:
        """Files are read only when their size or time is another: this is cheap enough for every step."""
        for path, seen in self._seen.items():
            now = _stat(path)
            if now != seen:
                if now is None or _content(path) != self._contents[path]:
                    return f"{path} {'is gone' if now is None else 'has other content'}"
                self._seen[path] = now  # touched, or copied over itself
        return ""


class JsonlRows(_Files):
    """One JSON object per line. Only where each line starts is kept, so memory does not grow with the rows."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.stem
        self._file = open(path, "rb")  # noqa: SIM115 - open as long as the rows are, so a replaced file is not mixed in
        weakref.finalize(self, self._file.close)
        self._starts = array("Q")
        """Byte at which row i starts, and at the end the size of the file."""
        self._rows_before_blank = array("Q")
        """For each blank line, how many rows come before it."""
        start = 0
        for line in self._file:
            if line.isspace():
                self._rows_before_blank.append(len(self._starts))
            else:
                self._starts.append(start)
            start += len(line)
        self._starts.append(start)
        super().__init__([path])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, i: int) -> Row:
        i = range(len(self))[i]
        start, end = self._starts[i], self._starts[i + 1]
        line = os.pread(self._file.fileno(), end - start, start)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where(i)}: not a JSON object on one line: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{self.where(i)}: {_JSON_TYPES[type(row)]}, not a JSON object")
        return row

    def where(self, i: int) -> str:
        return f"{self.path}:{i + 1 + bisect_right(self._rows_before_blank, i)}"

    @property
    def columns(self) -> tuple[str, ...]:
        names: dict[str, None] = {}
        for i in range(min(len(self), 100)):
            with suppress(DataError):
                names |= dict.fromkeys(self[i])
        return tuple(names)


class ParquetRows(_Files):
    """A Parquet file, decoded into an Arrow table; data larger than memory belongs in a Hugging Face folder."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        self.path, self.name = path, path.stem
        with boundary(DataError, f"{path} cannot be read as Parquet"):
            self._table = pyarrow.parquet.read_table(path, memory_map=True)
        super().__init__([path])

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._table.column_names)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, i: int) -> Row:
        return self._table.slice(range(len(self))[i], 1).to_pylist()[0]

    def where(self, i: int) -> str:
        return f"{self.path} row {i + 1}"


class HfRows(_Files):
    """A folder written by `datasets.save_to_disk`, memory-mapped."""

    def __init__(self, path: Path, split: str | None) -> None:
        try:
            import datasets
        except ImportError:
            raise DataError(
                f"{path} needs the library datasets, which is not installed: pip install datasets"
            ) from None
        with boundary(DataError, f"{path} cannot be read as a Hugging Face dataset"):
            loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            loaded = loaded[_checked_split(path, split, [str(name) for name in loaded])]
        elif split is not None:
            raise ConfigError(f"data.split={split} has no effect: {path} has no splits; leave it out")
        self.path = path
        self.name = path.resolve().name + (f"-{split}" if split else "")
        self._place = f"{path} ({split})" if split else str(path)
        self._dataset = loaded.with_format(None)  # it may have been saved as one of tensors
        super().__init__(Path(file["filename"]) for file in loaded.cache_files)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._dataset.column_names)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: int) -> Row:
        return self._dataset[i]

    def where(self, i: int) -> str:
        return f"{self._place} row {i + 1}"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no name is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


_JSON_TYPES = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}


def _not_there(place: Path) -> str:
    if not place.parent.is_dir():
        return f"{place} does not exist, nor does the folder {place.parent}"
    return f"{place} does not exist{did_you_mean(place.name, (entry.name for entry in place.parent.iterdir()))}"


def _format_at(place: Path) -> str:
    if place.is_dir() and any((place / name).is_file() for name in HF_FILES):
        return "hf"
    if place.is_file() and place.suffix.lower() in SUFFIXES:
        return SUFFIXES[place.suffix.lower()]
    what = "folder" if place.is_dir() else "file"
    raise ConfigError(
        f"{place} is a {what} of unknown format: data.path is {FORMATS}; "
        "for another file name set data.format to jsonl, parquet or hf"
    )


def _checked_split(path: Path, split: str | None, splits: list[str]) -> str:
    listed = ", ".join(splits)
    if split is None:
        raise ConfigError(f"{path} has the splits {listed}; set data.split to one of them")
    if split not in splits:
        raise ConfigError(f"{path} has no split {split!r}, only {listed}{did_you_mean(split, splits)}")
    return split


def _stat(path: Path) -> tuple[int, int, int] | None:
    try:
        now = path.stat()
    except OSError:
        return None
    return now.st_ino, now.st_size, now.st_mtime_ns


def _content(path: Path) -> bytes:
    """Hash of the bytes. All rows are read once anyway, and this is much faster than parsing them."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()
