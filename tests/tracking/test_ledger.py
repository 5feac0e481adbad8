"""Every sample of every step is in the ledger, whole, and readable without sluice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sluice.errors import DataError
from sluice.tracking.ledger import COLUMNS, num_rows, read_step, steps, write_step
from sluice.tracking.rundir import RunDir
from sluice.types import Completion, Group, Prompt, Sample, Trajectory, Turn


def pieces(ids: list[int]) -> list[str]:
    return [f"<{i}>" for i in ids]


def turn(prompt_ids: list[int], ids: list[int], version: int = 3) -> Turn:
    return Turn(prompt_ids, Completion(ids, [-0.1 * i for i in ids], "stop", [version] * len(ids), 0.7, f"text {ids}"))


def scored(*turns: Turn, reward: float = 1.0) -> Trajectory:
    return Trajectory(list(turns), "stop", "scored", reward, {"math": reward, "format/a": 0.5})


def trained(group: int, index: int) -> Sample:
    sample = Sample([1, 2, 5, 6], [0, 0, 1, 0.5], [0, 0, -0.5, -0.6], [-1, -1, 3, 3], 0.7, group, index, 1.0, "p")
    sample.advantages, sample.old_logprobs = [0, 0, 1.25, 1.25], [0, 0, -0.5, -0.6]
    sample.update, sample.current_logprobs = 2, [0, 0, -0.51, -0.3]
    sample.ratios, sample.clipped = [1, 1, 0.99, 1.35], [False, False, False, True]
    sample.ref_logprobs, sample.values, sample.returns = [0, 0, -0.4, -0.7], [0, 0, 0.25, 0.5], [0, 0, 1, 0.75]
    sample.turn_ids, sample.kept_ids = [-1, -1, 0, 0], [[], [], [5, 9], [4, 6, 8]]
    sample.turn_rewards, sample.routed_experts = [1.0], [b"\x01\0", b"", b"\xff\1", b""]
    return sample


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "run")


def rows(rundir: RunDir, step: int = 17) -> list[dict[str, Any]]:
    return read_step(rundir, step).to_pylist(maps_as_pydicts="strict")


def test_a_trained_sample_is_recorded_with_all_that_its_tokens_saw(rundir: RunDir):
    prompt = Prompt("p", [{"role": "user", "content": "1+1?"}], {"answer": [2]}, {"level": 3}, "data.jsonl:4")
    group = Group(40, prompt, [scored(turn([1, 2], [5, 6]))])
    path = write_step(rundir, 17, [group], [trained(40, 0)], pieces)
    assert path == rundir.path / "ledger" / "step-000017.parquet"
    (row,) = rows(rundir)
    floats = {name: row.pop(name) for name in list(row) if str(COLUMNS[name][0]) == "list<item: float>"}
    assert row == {
        "group": 40,
        "index": 0,
        "prompt_id": "p",
        "messages": '[{"role": "user", "content": "1+1?"}]',
        "reference": '{"answer": [2]}',
        "metadata": '{"level": 3}',
        "where": "data.jsonl:4",
        "response": "text [5, 6]",
        "finish_reason": "stop",
        "stop_reason": "stop",
        "outcome": "scored",
        "error": "",
        "reward": 1.0,
        "reward_parts": {"math": 1.0, "format/a": 0.5},
        "rejected": "",
        "trained": True,
        "update": 2,
        "temperature": 0.7,
        "token_ids": [1, 2, 5, 6],
        "tokens": ["<1>", "<2>", "<5>", "<6>"],
        "policy_versions": [-1, -1, 3, 3],
        "turn_rewards": [1.0],
        "turn_ids": [-1, -1, 0, 0],
        "kept_ids": [[], [], [5, 9], [4, 6, 8]],
        "routed_experts": b"\x01\0\xff\xff\xff\1\xff\xff",
        "clipped": [False, False, False, True],
    }
    expected = {
        "logprobs": [0, 0, -0.5, -0.6],
        "loss_weights": [0, 0, 1, 0.5],
        "advantages": [0, 0, 1.25, 1.25],
        "old_logprobs": [0, 0, -0.5, -0.6],
        "ref_logprobs": [0, 0, -0.4, -0.7],
        "values": [0, 0, 0.25, 0.5],
        "returns": [0, 0, 1, 0.75],
        "current_logprobs": [0, 0, -0.51, -0.3],
        "ratios": [1, 1, 0.99, 1.35],
    }
    assert floats == {name: [float(np.float32(value)) for value in values] for name, values in expected.items()}


def test_what_was_not_trained_on_is_there_with_its_tokens_and_nothing_invented(rundir: RunDir):
    """A rejected group, an attempt without a score, and one that failed before the engine said a word."""
    prompt = Prompt("p", [])
    failed = Trajectory([turn([1], [7, 8])], "stop", "timeout", error="reward 'math': no score after 10 s")
    silent = Trajectory([], "error", "error", error="environment raised")
    groups = [
        Group(1, prompt, [scored(turn([1, 2], [5, 6])), failed, silent]),
        Group(2, prompt, [scored(turn([3], [4]), reward=0.0)], rejected="all rewards equal (0)"),
    ]
    write_step(rundir, 17, groups, [trained(1, 0)], pieces)
    whole, timeout, error, rejected = rows(rundir)
    assert whole["trained"]
    for row in (timeout, error, rejected):
        assert (row["trained"], row["update"]) == (False, -1)
        for name in ("loss_weights", "advantages", "old_logprobs", "current_logprobs", "ratios", "clipped"):
            assert row[name] == []
    assert (timeout["outcome"], timeout["reward"], timeout["reward_parts"]) == ("timeout", None, {})
    assert "no score after 10 s" in timeout["error"]
    assert (timeout["token_ids"], timeout["policy_versions"]) == ([1, 7, 8], [-1, 3, 3])
    assert timeout["logprobs"] == pytest.approx([0, -0.7, -0.8])
    assert (error["token_ids"], error["tokens"], error["finish_reason"], error["temperature"]) == ([], [], None, None)
    assert (rejected["group"], rejected["rejected"], rejected["reward"]) == (2, "all rewards equal (0)", 0.0)
    assert rejected["reference"] is None


def test_a_sample_that_no_update_came_to_is_told_from_one_that_was_trained_on(rundir: RunDir):
    """As when the first update of a step is refused: what was known of the others until then is kept."""
    waiting = trained(1, 1)
    waiting.update, waiting.current_logprobs, waiting.ratios, waiting.clipped = -1, [], [], []
    group = Group(1, Prompt("p", []), [scored(turn([1, 2], [5, 6])), scored(turn([1, 2], [5, 6]))])
    write_step(rundir, 17, [group], [trained(1, 0), waiting], pieces)
    first, second = rows(rundir)
    assert [(row["trained"], row["update"], len(row["ratios"])) for row in (first, second)] == [
        (True, 2, 4),
        (False, -1, 0),
    ]
    assert second["advantages"] == [0, 0, 1.25, 1.25]


def test_a_broken_history_gives_several_rows_trained_or_not(rundir: RunDir):
    """Two turns that go on from each other are one row; the third edited the history and starts another."""
    turns = [turn([1], [2]), turn([1, 2, 3], [4], version=5), turn([9], [8])]
    turns[1].completion.kept_ids = [[4, 7]]
    turns[0].completion.routed_experts, turns[1].completion.routed_experts = [b"a", b""], [b"A", b"B", b"C", b""]
    groups = [Group(1, Prompt("p", []), [scored(*turns), scored(turn([1, 2], [5, 6]))], rejected="filter")]
    write_step(rundir, 17, groups, [], pieces)
    first, second, other = rows(rundir)
    assert [(row["index"], row["token_ids"]) for row in (first, second, other)] == [
        (0, [1, 2, 3, 4]),
        (0, [9, 8]),
        (1, [1, 2, 5, 6]),
    ]
    assert first["policy_versions"] == [-1, 3, -1, 5]
    assert [row["kept_ids"] for row in (first, second, other)] == [[[], [], [], [4, 7]], [], []]
    assert [row["routed_experts"] for row in (first, second, other)] == [b"aBC\xff", b"", b""]
    assert first["logprobs"] == pytest.approx([0, -0.2, 0, -0.4])

    groups[0].rejected = ""
    write_step(rundir, 18, groups, [trained(1, 0), trained(1, 0), trained(1, 1)], pieces)
    assert [(row["index"], row["trained"]) for row in rows(rundir, 18)] == [(0, True), (0, True), (1, True)]


def test_samples_of_no_group_are_refused_and_not_dropped(rundir: RunDir):
    with pytest.raises(ValueError, match=r"step 17: samples of unknown trajectories .*\[\(9, 0\)\]"):
        write_step(rundir, 17, [Group(1, Prompt("p", []), [])], [trained(9, 0)], pieces)
    assert steps(rundir) == []


def test_texts_and_values_that_parquet_or_json_cannot_hold_are_told_as_well_as_can_be(rundir: RunDir):
    prompt = Prompt("p\ud800", [{"role": "user", "content": "\ud800\x00"}], float("nan"), {"path": Path("a")})
    trajectory = Trajectory([], "error", "error", error="\udfff")
    write_step(rundir, 17, [Group(1, prompt, [trajectory])], [], pieces)
    (row,) = rows(rundir)
    assert (row["prompt_id"], row["error"], row["reference"]) == ("p?", "?", "null")
    assert json.loads(row["messages"])[0]["content"] == "\ud800\x00"
    assert json.loads(row["metadata"]) == {"path": "a"}


def test_the_file_explains_itself_and_is_read_without_sluice(rundir: RunDir):
    path = write_step(rundir, 17, [Group(1, Prompt("p", []), [scored(turn([1, 2], [5, 6]))])], [trained(1, 0)], pieces)
    schema = pq.read_schema(path)
    assert schema.names == list(COLUMNS)
    for field in schema:
        assert field.metadata[b"meaning"].decode() == COLUMNS[field.name][1]
    metadata = pq.read_metadata(path)
    assert {metadata.row_group(0).column(i).compression for i in range(metadata.num_columns)} == {"ZSTD"}


def test_steps_are_found_in_order_and_a_step_without_rows_is_one(rundir: RunDir):
    assert steps(rundir) == []
    for step in (1_000_000, 2, 17):
        write_step(rundir, step, [], [], pieces)
    (rundir.ledger / ".step-000003.parquet.99.partial").write_bytes(b"half")
    assert steps(rundir) == [2, 17, 1_000_000]
    assert num_rows(rundir, 2) == 0
    assert read_step(rundir, 2, ["group"]).column_names == ["group"]


def test_a_missing_or_broken_file_is_named(rundir: RunDir):
    with pytest.raises(DataError, match=r"step-000004\.parquet does not exist"):
        read_step(rundir, 4)
    path = write_step(rundir, 5, [], [], pieces)
    for broken in (b"", b"no parquet at all", path.read_bytes()[:-20]):
        path.write_bytes(broken)
        for read in (read_step, num_rows):
            with pytest.raises(DataError, match=r"cannot read .*step-000005\.parquet"):
                read(rundir, 5)


def test_a_file_of_another_version_is_told_by_what_it_lacks(rundir: RunDir):
    path = write_step(rundir, 5, [], [], pieces)
    pq.write_table(pq.read_table(path).drop_columns(["routed_experts"]), path)
    with pytest.raises(
        DataError, match=r"step-000005\.parquet is not as this version writes it \(it has no column routed_experts\)"
    ):
        read_step(rundir, 5)
    assert read_step(rundir, 5, ["group"]).column_names == ["group"]


WRITER = """
import sys
from pathlib import Path
from sluice.tracking.ledger import write_step
from sluice.tracking.rundir import RunDir
from sluice.types import Completion, Group, Prompt, Trajectory, Turn
n = 8_000
completion = Completion(list(range(n)), [-i / 7 for i in range(n)], "stop", [0] * n, 1.0)
groups = [Group(i, Prompt("p", []), [Trajectory([Turn([1], completion)])], "filter") for i in range(20)]
for step in range(1, 10_000):
    write_step(RunDir(Path(sys.argv[1])), step % 3, groups, [], lambda ids: [str(i) for i in ids])
    print(step, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_whole_steps_only(rundir: RunDir):
    """kill -9 while steps are written over and over: each file that is there can be read to its last row."""
    for attempt in range(4):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, rundir.path], stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "1\n"
        time.sleep(0.05 + 0.06 * attempt)
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate(timeout=60)
        assert steps(rundir)
        for step in steps(rundir):
            table = read_step(rundir, step)
            assert table.num_rows == 20
            assert table["token_ids"][19].as_py()[-1] == 7_999


def test_an_interrupted_write_leaves_no_half_file(rundir: RunDir):
    def interrupted(ids: list[int]) -> list[str]:
        raise KeyboardInterrupt

    group = Group(1, Prompt("p", []), [scored(turn([1], [2]))], "filter")
    with pytest.raises(KeyboardInterrupt):
        write_step(rundir, 1, [group], [], interrupted)
    assert not list(rundir.path.rglob("*.parquet*"))
