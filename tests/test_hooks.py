"""What a user may get wrong in a dotted path is told with the remedy, before a run starts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sluice.errors import ConfigError
from sluice.hooks import resolve

ARGUMENTS = ("prompt", "trajectory")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An own current folder; what is imported from it is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_finds_a_function_in_the_current_folder_and_inserts_the_folder_once(folder: Path):
    (folder / "hook_a.py").write_text("def reward(prompt, trajectory, scale=2): return scale\n")
    assert resolve("hook_a:reward", ARGUMENTS)(None, None) == 2
    resolve("hook_a:reward", ARGUMENTS)
    assert sys.path[0] == str(folder)
    assert sys.path.count(str(folder)) == 1


def test_takes_objects_that_can_be_called(folder: Path):
    (folder / "hook_b.py").write_text("class R:\n    def __call__(self, *all): return 1\nreward = R()\nany_ = max\n")
    assert resolve("hook_b:reward", ARGUMENTS)(1, 2) == 1
    assert resolve("hook_b:any_", ARGUMENTS)(1, 2) == 2


@pytest.mark.parametrize(
    ("dotted", "said"),
    [
        ("hook_wron:reward", r"hook_wron:reward: no module 'hook_wron' in .*did you mean hook_wrong\?"),
        ("absent.inside:reward", r"no module 'absent' in .*start sluice in the folder that holds it"),
        ("hook_wrong:rewrd", r"hook_wrong:rewrd: .*hook_wrong\.py\) has no 'rewrd'; did you mean hook_wrong:reward\?"),
        ("hook_wrong:something", r"has no 'something'; define something there"),
        ("hook_wrong:reward", r"takes \(a, b, c\); it is called with \(prompt, trajectory\): missing .*'c'"),
        ("hook_wrong:keyword", r"takes \(a, b, \*, c\); it is called with"),
        ("hook_wrong:limit", r"hook_wrong:limit is a int, not a function"),
        ("hook_wrong:Reward", r"hook_wrong:Reward is a type, not a function"),
        (
            "hook_raises:reward",
            r"raised ZeroDivisionError: division by zero at .*hook_raises\.py:2",
        ),
        (
            "hook_imports:reward",
            r"raised ModuleNotFoundError: .*'absent' at .*hook_imports\.py:1",
        ),
        ("hook_syntax:reward", r"raised SyntaxError: .* at .*hook_syntax\.py:1"),
        ("hook_exits:reward", r"raised SystemExit: 2 at .*hook_exits\.py:1"),
        ("no_colon", r"write it as module:function"),
        ("a-b:c", r"write it as module:function"),
    ],
)
def test_says_what_is_wrong_and_what_to_do(dotted: str, said: str, folder: Path):
    (folder / "hook_wrong.py").write_text(
        "limit = 3\nclass Reward: pass\ndef reward(a, b: int, c): pass\ndef keyword(a, b, *, c): pass\n"
    )
    (folder / "hook_raises.py").write_text("x = 0\ny = 1 / x\n")
    (folder / "hook_imports.py").write_text("import absent\n")
    (folder / "hook_syntax.py").write_text("def f(:\n")
    (folder / "hook_exits.py").write_text("raise SystemExit(2)\n")
    with pytest.raises(ConfigError, match=said):
        resolve(dotted, ARGUMENTS)


def test_async_where_it_is_awaited_and_only_there(folder: Path):
    """A coroutine that nothing awaits is true, and a plain function that is awaited fails at the first sample."""
    (folder / "hook_async.py").write_text("async def waits(a, b): pass\ndef plain(a, b): pass\n")
    assert resolve("hook_async:waits", ("a", "b"), awaited=True)
    with pytest.raises(ConfigError, match="is an `async def`; write a plain `def`"):
        resolve("hook_async:waits", ("a", "b"))
    with pytest.raises(ConfigError, match="is a plain `def`; write `async def`"):
        resolve("hook_async:plain", ("a", "b"), awaited=True)
