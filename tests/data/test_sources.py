"""Rows of the three formats are the same rows, and whatever cannot be read is named with its place."""

from __future__ import annotations

import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import shared_data
from sluice.data.sources import JsonlRows, open_rows
from sluice.errors import ConfigError, DataError

ROWS = [
    {"question": f"{i} + {i}?", "answer": str(2 * i), "tags": ["sum", "é"], "level": i, "meta": {"from": "us"}}
    for i in range(5)
]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, rows=ROWS):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def write_hf(path, rows=ROWS):
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def write_hf_splits(path):
    import datasets

    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:2])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(path))
    return path


def message(error):
    return str(error.value)


def test_all_formats_give_the_same_rows(tmp_path):
    places = [write_jsonl(tmp_path / "a.jsonl"), write_parquet(tmp_path / "a.parquet"), write_hf(tmp_path / "a_folder")]
    for place in places:
        rows = open_rows(str(place))
        assert [rows[i] for i in range(len(rows))] == ROWS
        assert rows.columns == ("question", "answer", "tags", "level", "meta")
        assert rows[-1] == ROWS[-1]
        with pytest.raises(IndexError):
            rows[len(ROWS)]


def test_where_and_name(tmp_path):
    jsonl, parquet = write_jsonl(tmp_path / "a.jsonl"), write_parquet(tmp_path / "b.v1.parquet")
    splits = write_hf_splits(tmp_path / "c.d")
    assert open_rows(str(jsonl)).where(3) == f"{jsonl}:4"
    assert open_rows(str(parquet)).where(3) == f"{parquet} row 4"
    assert open_rows(str(splits), split="test").where(1) == f"{splits} (test) row 2"
    assert open_rows(str(jsonl)).name == "a"
    assert open_rows(str(parquet)).name == "b.v1"
    assert open_rows(str(splits), split="test").name == "c.d-test"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.JSONL"])
def test_suffixes_of_jsonl(tmp_path, name):
    assert len(open_rows(str(write_jsonl(tmp_path / name)))) == len(ROWS)


def test_format_overrides_the_suffix(tmp_path):
    assert len(open_rows(str(write_jsonl(tmp_path / "rows.txt")), format="jsonl")) == len(ROWS)
    assert len(open_rows(str(write_parquet(tmp_path / "rows.bin")), format="parquet")) == len(ROWS)


def test_blank_lines_are_ignored_and_line_numbers_stay_true(tmp_path):
    """A line number in an error must be the one that an editor shows."""
    path = tmp_path / "gaps.jsonl"
    path.write_bytes(b'\n  \n{"a": 0}\n\n{"a": 1}\r\n\t\n\n{"a": 2}\n{"a": 3}')
    rows = open_rows(str(path))
    assert [rows[i]["a"] for i in range(len(rows))] == [0, 1, 2, 3]
    assert [rows.where(i) for i in range(len(rows))] == [f"{path}:{line}" for line in (3, 5, 8, 9)]


def test_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\n')
    assert open_rows(str(path))[0] == {"a": "é"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "not a JSON object on one line: Expecting ',' delimiter"),
        (b"[", "not a JSON object on one line: Expecting value"),
        (b'[{"a": 1}]', "a list, not a JSON object"),
        (b"null", "null, not a JSON object"),
        (b"3.5", "a number, not a JSON object"),
        (b"true", "a boolean, not a JSON object"),
        (b'"text"', "a text, not a JSON object"),
        (b'{"a": "\xff"}', "not a JSON object on one line: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "not a JSON object on one line: maximum recursion depth"),
    ],
)
def test_a_line_that_is_no_object_is_named(tmp_path, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"a": 0}\n' + line + b"\n")
    rows = open_rows(str(path))
    with pytest.raises(DataError) as error:
        rows[1]
    assert message(error).startswith(f"{path}:2: {reason}")
    assert rows.columns == ("a",)


def test_jsonl_keeps_offsets_only(tmp_path):
    """Memory must not grow with the rows' contents: 8 bytes a row."""
    path = tmp_path / "big.jsonl"
    path.write_text(('{"text": "' + "x" * 1000 + '"}\n') * 20_000)
    rows = JsonlRows(path)
    assert rows[19_999] == {"text": "x" * 1000}
    arrays = [value for value in vars(rows).values() if hasattr(value, "itemsize")]
    assert sum(len(each) * each.itemsize for each in arrays) == 8 * 20_001
    assert not [value for value in vars(rows).values() if isinstance(value, list | dict) and len(value) > 1]


def test_an_open_file_is_not_mixed_with_its_replacement(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    rows = open_rows(str(path))
    os.replace(write_jsonl(tmp_path / "new.jsonl", [{"other": "x" * 100}] * 5), path)
    assert [rows[i] for i in range(5)] == ROWS


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_hf], ids=["jsonl", "parquet", "hf"])
def test_fingerprint_is_of_the_content(tmp_path, write):
    """A copy on another day resumes; other data of the same size does not."""
    changed = [*ROWS[:-1], {**ROWS[-1], "answer": "9"}]
    suffix = {write_jsonl: ".jsonl", write_parquet: ".parquet", write_hf: ""}[write]
    first, again, other = (
        open_rows(str(write(tmp_path / (name + suffix), rows))).fingerprint
        for name, rows in [("one", ROWS), ("two", ROWS), ("three", changed)]
    )
    assert first == again
    assert first != other


def test_hf_splits(tmp_path):
    place = write_hf_splits(tmp_path / "both")
    assert len(open_rows(str(place), split="train")) == 5
    assert len(open_rows(str(place), split="test")) == 2
    prints = {open_rows(str(place), split=split).fingerprint for split in ("train", "test")}
    assert len(prints) == 2
    with pytest.raises(ConfigError) as error:
        open_rows(str(place))
    assert message(error) == f"{place} has the splits train, test; set data.split to one of them"
    with pytest.raises(ConfigError) as error:
        open_rows(str(place), split="tests")
    assert message(error) == f"{place} has no split 'tests', only train, test; did you mean 'test'?"


def test_hf_saved_as_numpy_gives_plain_values(tmp_path):
    """A dataset remembers the format it was saved in; rewards must see the same types from every source."""
    import datasets

    place = tmp_path / "numpy"
    datasets.Dataset.from_list([{"level": 1, "tags": ["a"]}]).with_format("numpy").save_to_disk(str(place))
    row = open_rows(str(place))[0]
    assert row == {"level": 1, "tags": ["a"]}
    assert type(row["level"]) is int
    assert type(row["tags"]) is list


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_hf], ids=["jsonl", "parquet", "hf"])
def test_split_where_there_are_none_is_refused(tmp_path, write):
    suffix = {write_jsonl: ".jsonl", write_parquet: ".parquet", write_hf: ""}[write]
    place = write(tmp_path / ("a" + suffix))
    with pytest.raises(ConfigError) as error:
        open_rows(str(place), split="train")
    assert message(error).startswith(f"data.split=train has no effect: {place}")


def test_hf_without_the_library_says_what_to_install(tmp_path, monkeypatch):
    place = write_hf(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "datasets", None)  # what an import of a package that is not there meets
    with pytest.raises(DataError, match="pip install datasets"):
        open_rows(str(place))


def test_missing_file_names_the_near_one(tmp_path):
    write_jsonl(tmp_path / "train.jsonl")
    with pytest.raises(DataError) as error:
        open_rows(str(tmp_path / "trian.jsonl"))
    assert message(error) == f"{tmp_path / 'trian.jsonl'} does not exist; did you mean 'train.jsonl'?"
    with pytest.raises(DataError) as error:
        open_rows(str(tmp_path / "zzz"))
    assert message(error) == f"{tmp_path / 'zzz'} does not exist"
    with pytest.raises(DataError) as error:
        open_rows(str(tmp_path / "nowhere" / "train.jsonl"))
    assert message(error).endswith(f"does not exist, nor does the folder {tmp_path / 'nowhere'}")


def test_unknown_format_names_the_three(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n")
    for place in (tmp_path / "rows.csv", tmp_path):
        with pytest.raises(ConfigError) as error:
            open_rows(str(place))
        assert str(place) in message(error)
        for format in ("JSONL", "Parquet", "save_to_disk"):
            assert format in message(error)
    with pytest.raises(ConfigError, match=r"data\.format=csv is not known; it is one of auto, jsonl, parquet, hf"):
        open_rows(str(tmp_path / "rows.csv"), format="csv")


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_folder_is_no_file(tmp_path, format):
    with pytest.raises(DataError, match=f"is a folder, and data.format={format} reads a file"):
        open_rows(str(tmp_path), format=format)


def test_no_rows(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    for name in ("empty.jsonl", "blank.jsonl", "empty.parquet"):
        with pytest.raises(DataError) as error:
            open_rows(str(tmp_path / name))
        assert message(error) == f"{tmp_path / name} has no rows"


def test_broken_files_are_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(DataError) as error:
        open_rows(str(tmp_path / "bad.parquet"))
    assert message(error).startswith(f"{tmp_path / 'bad.parquet'} cannot be read as Parquet: ")
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError) as error:
        open_rows(str(tmp_path))
    assert message(error).startswith(f"{tmp_path} cannot be read as a Hugging Face dataset: ")


def test_real_file_by_number_is_the_file_by_line():
    path = shared_data("gsm8k/train.jsonl")
    rows = open_rows(str(path))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(rows) == len(lines) == 7473
    assert all(rows[i] == json.loads(lines[i]) for i in range(len(rows)))


def test_content_that_changes_after_opening_is_told(tmp_path):
    """In place, by another file of its name, or by taking it away; but not when it is only touched or written as it was."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n')
    rows = open_rows(str(path))
    assert rows.changed() == ""
    os.utime(path, ns=(1, 1))
    assert rows.changed() == ""
    path.unlink()
    assert rows.changed() == f"{path} is gone"
    path.write_text('{"prompt": "a"}\n')
    assert rows.changed() == ""
    path.write_text('{"prompt": "b"}\n')
    assert rows.changed() == f"{path} has other content"
    assert rows.changed() == f"{path} has other content", "it stays told"
