"""The run folder is made once, and whatever is killed while writing leaves what was written before whole."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sluice.errors import ConfigError, DataError
from sluice.tracking.rundir import RunDir, append_line, describe_environment, read_lines, write_atomically

TIMEOUT_S = 60


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"from pathlib import Path\nimport sys\n{code}", *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# Making the folder


def test_an_existing_folder_is_refused_with_the_remedy_and_left_as_it_is(tmp_path: Path):
    run = RunDir.create(tmp_path / "runs", "first")
    run.config.write_text("seed: 1\n")
    before = run.path.stat().st_mtime_ns
    with pytest.raises(
        ConfigError, match=r"first exists already, and was left as it is; .*--resume .*first; .*run\.name"
    ):
        RunDir.create(tmp_path / "runs", "first")
    assert [path.name for path in run.path.iterdir()] == ["config.yaml"]
    assert run.path.stat().st_mtime_ns == before


def test_a_parent_that_is_a_file_is_refused_by_name(tmp_path: Path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(ConfigError, match="runs is not a folder"):
        RunDir.create(tmp_path / "runs", "first")
    with pytest.raises(ConfigError, match=r"Not a directory.*run\.folder"):
        RunDir.create(tmp_path / "runs" / "deeper", "first")


def test_of_processes_that_race_for_a_name_exactly_one_wins(tmp_path: Path):
    code = """
from sluice.errors import ConfigError
from sluice.tracking.rundir import RunDir
print("ready", flush=True)
for name in sys.stdin:
    try:
        RunDir.create(sys.argv[1], name.strip())
        print("won", flush=True)
    except ConfigError:
        print("lost", flush=True)
"""
    racers = [start(code, tmp_path) for _ in range(3)]
    try:
        for racer in racers:
            assert racer.stdout.readline() == "ready\n"
        for i in range(50):
            for racer in racers:
                racer.stdin.write(f"run-{i}\n")
                racer.stdin.flush()
            assert sorted(racer.stdout.readline() for racer in racers) == ["lost\n", "lost\n", "won\n"]
    finally:
        for racer in racers:
            racer.communicate(timeout=TIMEOUT_S)


# JSON lines


def test_lines_come_back_in_order_and_what_json_cannot_say_is_null(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1, "reward": 0.1, "nan": math.nan, "deep": {"inf": [math.inf, (1, -math.inf)]}})
    append_line(path, {"text": "two\nlines – \ud800", "object": Path("a")})
    strict = [
        json.loads(line, parse_constant=lambda token: pytest.fail(token)) for line in path.read_text().splitlines()
    ]
    assert strict == read_lines(path)
    assert strict == [
        {"step": 1, "reward": 0.1, "nan": None, "deep": {"inf": [None, [1, None]]}},
        {"text": "two\nlines – \ud800", "object": "a"},
    ]


def test_a_torn_last_line_is_not_read_and_does_not_spoil_the_next(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    append_line(path, {"step": 1})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "text": "\xe2\x82')
    assert read_lines(path) == [{"step": 1}]
    append_line(path, {"step": 3})
    assert read_lines(path) == [{"step": 1}, {"step": 3}]


def test_a_torn_first_line_leaves_nothing(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"ste')
    assert read_lines(path) == []
    append_line(path, {"step": 1})
    assert path.read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize("broken", [b"{not json}", b"\xff", b"", b"3", b'{"a": 1}{"b": 2}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, broken: bytes):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + broken + b'\n{"step": 3}\n')
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}:2: "):
        read_lines(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"cannot read .*metrics\.jsonl"):
        read_lines(tmp_path / "metrics.jsonl")


def test_a_full_disk_is_an_error_and_not_half_a_record():
    """/dev/full refuses every write; so does a disk."""
    with pytest.raises(OSError, match="No space left"):
        append_line(Path("/dev/full"), {"step": 1})


def test_a_writer_killed_at_any_moment_leaves_whole_lines(tmp_path: Path):
    """kill -9 in a loop over one file: everything the writer was told is on disk is there, once and in order."""
    path = tmp_path / "metrics.jsonl"
    code = """
from sluice.tracking.rundir import append_line, read_lines
path = Path(sys.argv[1])
n = len(read_lines(path)) if path.exists() else 0
while True:
    append_line(path, {"n": n, "filler": "x" * (n % 7) * 100_000})
    print(n, flush=True)
    n += 1
"""
    said = -1
    for attempt in range(8):
        writer = start(code, path)
        assert int(writer.stdout.readline()) == said + 1
        time.sleep(0.005 + 0.007 * attempt)
        os.kill(writer.pid, signal.SIGKILL)
        rest, _ = writer.communicate(timeout=TIMEOUT_S)
        said = max([said + 1, *(int(line) for line in rest.split("\n")[:-1])])
        records = read_lines(path)
        assert [record["n"] for record in records] == list(range(len(records)))
        assert said <= len(records) - 1 <= said + 1  # the last may be written, and not yet told
        said = len(records) - 1


# Whole files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "report.html"
    write_atomically(path, b"old")

    def fail(file) -> None:
        file.write(b"half of the new")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["report.html"]
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_a_killed_write_leaves_the_old_or_the_new_file(tmp_path: Path):
    path = tmp_path / "file"
    code = """
from sluice.tracking.rundir import write_atomically
n = 0
while True:
    write_atomically(Path(sys.argv[1]), bytes([n % 256]) * 3_000_000)
    print("written", flush=True)
    n += 1
"""
    for attempt in range(5):
        writer = start(code, path)
        assert writer.stdout.readline() == "written\n"
        time.sleep(0.003 + 0.004 * attempt)
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate(timeout=TIMEOUT_S)
        content = path.read_bytes()
        assert len(content) == 3_000_000
        assert len(set(content)) == 1


# What it ran on


def test_the_environment_says_what_decides_a_repetition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a real repository, clean and changed, and outside of one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("HF_TOKEN", "secret-of-mine")
    about = describe_environment()
    assert about["git"] is None
    assert "secret-of-mine" not in json.dumps(about)
    assert about["variables"]["OMP_NUM_THREADS"] == "2"
    assert re.fullmatch(r"\d+\.\d+\.\S+", about["versions"]["torch"])
    assert about["memory_bytes"] > 2**28

    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "file"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *arguments], check=True, timeout=TIMEOUT_S)
    git = describe_environment()["git"]
    assert re.fullmatch("[0-9a-f]{40}", git["commit"])
    assert git["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert describe_environment()["git"] == {**git, "dirty": True}


def test_reading_and_writing_a_run_loads_neither_torch_nor_transformers():
    """The viewer and `sluice config` start without them."""
    code = """
import sluice.viewer.report, sluice.tracking.tracker, sluice.tracking.console
from sluice.tracking.rundir import describe_environment
assert describe_environment()["cuda_devices"] == []
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    output, _ = start(code).communicate(timeout=TIMEOUT_S)
    assert output == "[]\n"
