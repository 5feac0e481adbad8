"""The YAML of config files: which value a text means, and what is said of files and settings that cannot be read."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml

from sluice.configtree import Node, inline, merge, override, read
from sluice.errors import ConfigError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test stands in a folder of its own, so that files have short names."""
    monkeypatch.chdir(tmp_path)


def tree(text: str | bytes) -> Node:
    Path("a.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    return read("a.yaml")


def refusal(text: str | bytes, *settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        functools.reduce(override, settings, tree(text))
    return str(caught.value)


def both_ways(text: str) -> tuple[Any, Any]:
    """What a text means in a file, and as a setting."""
    return tree(f"key: {text}\n").plain()["key"], override(Node({}, ""), f"key={text}").plain()["key"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-5", 5e-5),
        ("1E+6", 1e6),
        ("+.5", 0.5),
        ("-5.", -5.0),
        ("1_000.5", 1000.5),
        (".inf", float("inf")),
        ("-.INF", -float("inf")),
        ("1_000", 1000),
        ("010", 10),
        ("-3", -3),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("'5'", "5"),
    ],
)
def test_values_are_those_of_yaml_1_2(text: str, value: object) -> None:
    """PyYAML alone reads 5e-5 as text and 010 as eight."""
    for read_value in both_ways(text):
        assert read_value == value
        assert type(read_value) is type(value)


@pytest.mark.parametrize(
    "text",
    ["no", "on", "yes", "off", "y", "1:30", "2024-01-01", "0x10", "<<", "nan", "inf", "=", "1e", "_1", "1__0", "."],
)
def test_everything_else_is_text(text: str) -> None:
    """Much of it PyYAML alone takes for a boolean, a date, or minutes."""
    assert both_ways(text) == (text, text)


def test_mappings_merge_and_everything_else_is_replaced() -> None:
    Path("b.yaml").write_text("s: {a: 2, t: {y: 3}}\nl: [3]\nn: {k: 1}\n")
    merged = merge(tree("s: {a: 1, b: 1, t: {x: 1}}\nl: [1, 2]\nn: 5\n"), read("b.yaml"))
    assert merged.plain() == {"s": {"a": 2, "b": 1, "t": {"x": 1, "y": 3}}, "l": [3], "n": {"k": 1}}
    origins = {key: node.origin for key in ("a", "b") if (node := merged.find(("s", key)))}
    assert origins == {"a": "b.yaml:1", "b": "a.yaml:1"}


def test_a_setting_changes_nothing_else() -> None:
    before = tree("l:\n  - {w: 1, v: 1}\n  - 2\n")
    after = override(before, "l.0.w=5")
    assert after.plain() == {"l": [{"w": 5, "v": 1}, 2]}
    assert before.plain() == {"l": [{"w": 1, "v": 1}, 2]}
    assert [after.nearest(("l", 0, key)).origin for key in "wv"] == ["command line", "a.yaml:2"]


@pytest.mark.parametrize(
    "value",
    [*[1e-6, 1e300, float("inf"), 3, True, None, [], ["no", 1.5]],
     *["", "no", "5e-5", "null", "~", "010", "1:30", "2024-01-01", " x ", "a #b", "a: b", "["],
     *["é\n\t\x7f\x85\u2028😀", "w " * 99]],
)  # fmt: skip
def test_what_is_written_is_on_one_line_and_read_back_by_any_reader(value: Any) -> None:
    """PyYAML's own reader follows YAML 1.1; scripts of users will read config.yaml with it."""
    text = inline(value)
    assert len(text.splitlines()) == 1
    assert tree(f"key: {text}  # origin\n").plain() == yaml.safe_load(f"key: {text}  # origin\n") == {"key": value}


FILE = "model:\n  path: tiny\nrewards:\n  - name: math\n  - name: format\n"


# Mistakes in a setting


def test_a_setting_without_equals_sign_explains_the_grammar() -> None:
    grammar = "write key.path=value, e.g. trainer.learning_rate=1e-5 or rewards.0.weight=0.5"
    assert refusal(FILE, "fast") == f"command line: 'fast' is not a setting: {grammar}"
    assert refusal(FILE, "a.yaml") == (
        f"command line: 'a.yaml' is not a setting: {grammar}; config files come before key=value settings"
    )
    for malformed in ("--run.seed=1", "=1", "run..seed=1", "run.seed.=1", "rewards.-1.weight=1"):
        assert refusal(FILE, malformed) == f"command line: {malformed!r} is not a setting: {grammar}"


def test_settings_of_items_that_are_not_there() -> None:
    assert refusal(FILE, "rewards.2.weight=1") == (
        "command line: rewards.2.weight: rewards has 2 items, counted from 0, and no 2"
    )
    assert refusal(FILE, "rewards.first.weight=1") == (
        "command line: rewards.first.weight: rewards has 2 items, counted from 0, and no first"
    )
    assert refusal(FILE, "trainer.betas.0=0.8") == (
        "command line: trainer.betas.0: trainer.betas is not set, so it has no item 0; set the list: trainer.betas=[…]"
    )
    assert (
        refusal(FILE, "model.path.x=1") == "command line: model.path.x: model.path is 'tiny' (a.yaml:2) and has no keys"
    )


@pytest.mark.parametrize("value", ["#### (.+)", "a #b", '"a" # b', "[1] # b"])
def test_a_comment_in_a_setting_is_refused(value: str) -> None:
    """`data.reference_pattern=#### (.+)` would silently be null."""
    assert refusal(FILE, f"data.reference_pattern={value}") == (
        f"command line: '#' begins a comment, in data.reference_pattern={value}; "
        "put text in quotes: data.reference_pattern='\"…\"'"
    )
    quoted = override(tree(FILE), 'data.reference_pattern="#### (.+)"')
    assert quoted.plain()["data"] == {"reference_pattern": "#### (.+)"}


def test_a_setting_that_is_not_yaml() -> None:
    message = refusal(FILE, "data.system_prompt=[Answer: x] now")
    assert message.startswith("command line: not YAML: ")
    assert message.endswith("in data.system_prompt=[Answer: x] now; put text in quotes: data.system_prompt='\"…\"'")


# Mistakes in a file


def test_duplicate_keys_are_refused_with_both_lines() -> None:
    assert refusal("run:\n  seed: 1\n  num_steps: 3\n  seed: 2\n") == ("a.yaml:4: 'seed' is already set at a.yaml:2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "run:\n\tseed: 1\n",
            "a.yaml:2: not YAML: while scanning for the next token, found character '\\t' that cannot start any token",
        ),
        (
            "run: {seed: 1\n",
            "a.yaml:2: not YAML: while parsing a flow mapping, expected ',' or '}', but got '<stream end>'",
        ),
        (
            "run:\n  seed: 1\n---\nrun:\n",
            "a.yaml:3: not YAML: expected a single document in the stream, but found another document",
        ),
        (b"run:\n  name: \xff\n", "a.yaml:2: not YAML: invalid start byte, in byte 13"),
        (b"run:\n\xff: 1\n", "a.yaml:2: not YAML: invalid start byte, in byte 5"),
        ("run:\n  name: a\0b\n", "a.yaml:2: not YAML: special characters are not allowed, in byte 14"),
        ("run: !!python/object:os.system {}\n", "a.yaml:1: this cannot be read as !!python/object:os.system"),
        ("run:\n  seed: !!int x\n", "a.yaml:2: this cannot be read as !!int"),
        ("run: !!null {seed: 1}\n", "a.yaml:1: this cannot be read as !!null"),
        ("run:\n  ? [a]\n  : 1\n", "a.yaml:2: a key must be a word, not a list or a mapping"),
        ("run: &run\n  name: *run\n", "a.yaml:1: nested too deeply, or an anchor that contains itself"),
        ("# top\n- a\n", "a.yaml:2: a config file is a mapping of sections, not [a]"),
        ("just text\n", "a.yaml:1: a config file is a mapping of sections, not 'just text'"),
    ],
)
def test_files_that_are_no_config(content: str | bytes, message: str) -> None:
    assert refusal(content) == message


def test_a_missing_file_is_answered_with_near_names() -> None:
    tree(FILE)
    with pytest.raises(ConfigError, match=r"^config file aa\.yaml does not exist; did you mean a\.yaml\?$"):
        read("aa.yaml")
    with pytest.raises(ConfigError, match=r"^config file nowhere/x\.yaml does not exist$"):
        read("nowhere/x.yaml")
    with pytest.raises(ConfigError, match=r"^config file \. cannot be read: Is a directory$"):
        read(".")
