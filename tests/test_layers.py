"""Imports go down only, rooms of one level never import each other, and heavy packages have one home each.

Every import counts: in functions and under TYPE_CHECKING too, since a type that one room takes from another ties
the two together as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "sluice"

# Lowest first. A name stands for the file or folder and all below it; names joined by + are one room in several files.
LEVELS = [
    ["types", "errors", "tracking.metrics"],  # metrics are values of the standard library only, and a Trainer gives them
    ["interfaces", "hooks", "config+configtree+configfile"],
    ["tracking"],
    ["run"],
    ["algorithms"],
    ["data", "rewards"],
    ["environments", "weights"],
    ["engines", "trainers"],
    ["rollout"],
    ["checkpoint"],
    ["train", "viewer"],
    ["launch"],
    ["cli"],
]
PLACES = {
    name: (level, room) for level, rooms in enumerate(LEVELS) for room in rooms for name in room.split("+")
}
# Run folders are a contract: whoever reads them needs nothing else of a run.
ONLY = {"viewer": {"types", "errors", "tracking.rundir", "tracking.ledger", "viewer"}}
HOMES = {
    "torch": {"algorithms", "data.batch", "engines", "trainers", "train"},
    "matplotlib": {"viewer"},
    "pebble": {"rewards"},
    "multiprocessing": {"rewards"},
}
# The table of algorithms is read by `--help` and the config, and so is the first file of its folder.
NO_TORCH = {"algorithms", "algorithms.spec"}
# `launch` sets the number of threads; the protocol of a language model speaks of tensors and loads none.
ELSEWHERE = {("launch", "torch"): "in a function", ("interfaces", "torch"): "under TYPE_CHECKING"}


def place(module: str) -> tuple[int, str] | None:
    """Level and room of a module, named without `sluice.`; the longest name in the table that it is below."""
    while module not in PLACES and "." in module:
        module = module.rpartition(".")[0]
    return PLACES.get(module)


def imports(source: Path, module: str, tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """(line, what is imported, where) of every import; for `from a import b`, a.b where that is a module."""
    where: dict[ast.AST, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            where |= dict.fromkeys(ast.walk(node), "in a function")
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            where |= dict.fromkeys((inner for child in node.body for inner in ast.walk(child)), "under TYPE_CHECKING")
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folder = ["sluice", *module.split(".")][: -node.level]
                base = ".".join([*folder, base] if base else folder)
            parts = [f"{base}.{alias.name}" for alias in node.names]
            names = [part if exists(source, part) else base for part in parts]
        else:
            continue
        for name in dict.fromkeys(names):
            yield node.lineno, name, where.get(node, "at the top")


def exists(source: Path, name: str) -> bool:
    path = source.joinpath(*name.split(".")[1:])
    return name.startswith("sluice.") and (path.is_dir() or path.with_suffix(".py").is_file())


def violations(source: Path) -> list[str]:
    found = []
    for path in sorted(source.rglob("*.py")):
        module = ".".join(path.relative_to(source).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        # `sluice/__init__.py` itself is below everything
        level, room = (place(module) or (None, "")) if module else (-1, "sluice")
        if level is None:
            found.append(f"{module}: has no place in LEVELS")
            continue
        file = module + "." * (path.name == "__init__.py")  # relative imports start from the folder
        for line, name, where in imports(source, file, ast.parse(path.read_text())):
            package, _, target = name.partition(".")
            if package in HOMES:
                at_home = any(f"{module}.".startswith(f"{home}.") for home in HOMES[package])
                if (not at_home or module in NO_TORCH) and ELSEWHERE.get((module, package)) != where:
                    found.append(f"{module}:{line}: {package} {where}")
            elif package == "sluice" and target:
                below, other = place(target) or (level, target)
                outside = not any(f"{target}.".startswith(f"{name}.") for name in ONLY.get(room, {target}))
                if outside or (other != room and below >= level):
                    found.append(f"{module}:{line}: {target}")
    return found


def test_imports_go_down_only():
    assert violations(SOURCE) == []


def test_every_place_is_taken():
    """A room that is gone leaves no rule behind."""
    assert [name for name in PLACES if not exists(SOURCE, f"sluice.{name}")] == []


PLANTED = {
    "engines/scripted.py": ("from sluice.rollout.buffer import GroupBuffer", "engines.scripted:1: rollout.buffer"),
    "config.py": ("def load():\n    import sluice.launch", "config:2: launch"),
    "data/chat.py": (
        "if TYPE_CHECKING:\n    from sluice.engines import embedded",
        "data.chat:2: engines.embedded",
    ),
    "trainers/local.py": ("from sluice.engines.slots import SlotCache", "trainers.local:1: engines.slots"),
    "rewards/rubric.py": ("from ..data.chat import Chat", "rewards.rubric:1: data.chat"),
    "rewards/__init__.py": ("from ..environments import single_turn", "rewards:1: environments.single_turn"),
    "types.py": ("from sluice import errors", "types:1: errors"),
    "viewer/report.py": ("from sluice.tracking.metrics import Mean", "viewer.report:1: tracking.metrics"),
    "viewer/curves.py": ("from sluice.data.chat import Chat", "viewer.curves:1: data.chat"),
    "__init__.py": ("from sluice.config import TrainConfig", ":1: config"),
    "utils.py": ("", "utils: has no place in LEVELS"),
    "algorithms/spec.py": ("from torch import Tensor", "algorithms.spec:1: torch at the top"),
    "algorithms/__init__.py": ("import torch.nn", "algorithms:1: torch at the top"),
    "rollout/worker.py": ("def f():\n    import torch", "rollout.worker:2: torch in a function"),
    "launch.py": ("import torch", "launch:1: torch at the top"),
    "interfaces.py": ("def f():\n    import torch", "interfaces:2: torch in a function"),
    "tracking/console.py": ("import matplotlib.pyplot as plt", "tracking.console:1: matplotlib at the top"),
    "engines/embedded.py": (
        "from multiprocessing import Pool",
        "engines.embedded:1: multiprocessing at the top",
    ),
}


@pytest.mark.parametrize("file", PLANTED)
def test_a_planted_import_is_caught(tmp_path: Path, file: str):
    """Each in a copy of the real tree's file names, where nothing else is wrong."""
    for path in SOURCE.rglob("*.py"):
        copy = tmp_path / path.relative_to(SOURCE)
        copy.parent.mkdir(exist_ok=True)
        copy.touch()
    code, complaint = PLANTED[file]
    (tmp_path / file).write_text(code)
    assert violations(tmp_path) == [complaint]


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("launch.py", "def f():\n    import torch\n    from sluice.train import train"),
        ("interfaces.py", "if TYPE_CHECKING:\n    import torch\n    from sluice.tracking.metrics import Metrics"),
        ("configfile.py", "from sluice.config import TrainConfig"),
        ("viewer/report.py", "from sluice.viewer.curves import draw\nfrom sluice.tracking import ledger, rundir"),
        ("cli.py", "from sluice import __version__"),
        ("trainers/local.py", "import torch\nfrom sluice.weights.in_process import InProcessWeights"),
    ],
)
def test_what_is_allowed_is_not_caught(tmp_path: Path, file: str, code: str):
    for path in SOURCE.rglob("*.py"):
        copy = tmp_path / path.relative_to(SOURCE)
        copy.parent.mkdir(exist_ok=True)
        copy.touch()
    (tmp_path / file).write_text(code)
    assert violations(tmp_path) == []
