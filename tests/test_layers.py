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
    [
        "types",
        "errors",
        "waits",
        "threads",
        "cpu",
        "tracking.metrics",
    ],  # metrics are values of the standard library only, and a Trainer gives them
    [
        "interfaces",
        "hooks",
        "processes+connection",
        "config+configbase+configengines+configplacement+configrewards+configsafety+configtraining+configtree+configfile",
    ],
    ["tracking"],
    ["run", "watchdog+dump"],
    ["algorithms"],
    ["data", "rewards", "distributed"],
    ["environments", "weights"],
    ["engines", "trainers"],
    ["rollout"],
    ["checks"],
    ["checkpoint", "update"],
    ["train", "replay", "viewer", "describe", "analysis"],
    ["launch"],
    ["preflight"],
    ["cli"],
]
PLACES = {name: (level, room) for level, rooms in enumerate(LEVELS) for room in rooms for name in room.split("+")}
# Run folders are a contract: whoever reads them needs nothing else of a run.
READS_RUNS = {"types", "errors", "tracking.rundir", "tracking.ledger"}
ONLY = {"viewer": {*READS_RUNS, "viewer"}, "analysis": {*READS_RUNS, "algorithms", "analysis"}}
HOMES = {
    "torch": {
        *(
            "algorithms",
            "cpu",
            "data.batch",
            "weights",
            "engines",
            "trainers",
        ),
        *("rollout.metrics", "update", "checkpoint", "analysis.binary_reward"),
    },
    "peft": {"trainers.lora"},
    "matplotlib": {"viewer", "analysis.plots"},
    "ray": {"distributed.cluster", "distributed.actors"},
    "pebble": {"rewards"},
    "multiprocessing": {"rewards"},
}
# The table of algorithms is read by `--help` and the config, and so is the first file of its folder; chunks by `sluice check`.
NO_TORCH = {"algorithms", "algorithms.spec", "algorithms.explain", "trainers.chunks"}
# `launch` sets the number of threads; the protocol of a language model speaks of tensors and loads none.
ELSEWHERE = {
    ("launch.models", "torch"): "in a function",
    ("launch.ranks", "torch"): "in a function",
    ("interfaces", "torch"): "under TYPE_CHECKING",
}


def place(module: str) -> tuple[int, str] | None:
    """Level and room of a module, named without `sluice.`; the longest name in the table that it is below."""
    while module not in PLACES and "." in module:
        module = module.rpartition(".")[0]
    return PLACES.get(module)


def imports(source: Path, tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """(line, what is imported, where) of every import; for `from a import b`, a.b where that is a module."""
    where: dict[ast.AST, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            where |= dict.fromkeys(ast.walk(node), "in a function")
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            where |= dict.fromkeys(ast.walk(node), "under TYPE_CHECKING")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            base = "." * node.level + (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            names = [f"{base}.{alias.name}" if base else alias.name for alias in node.names]
            for name in dict.fromkeys(name if not base or exists(source, name) else base for name in names):
                yield node.lineno, name, where.get(node, "at the top")


def exists(source: Path, name: str) -> bool:
    path = source.joinpath(*name.split(".")[1:])
    return name.startswith("sluice.") and (path.is_dir() or path.with_suffix(".py").is_file())


def is_below(name: str, places: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{place}.") for place in places)


def violations(source: Path) -> list[str]:
    return [
        f"{module}: {complaint}"
        for path in sorted(source.rglob("*.py"))
        for module in [".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__")]
        for complaint in complaints_of(module, source, ast.parse(path.read_text()))
    ]


def complaints_of(module: str, source: Path, tree: ast.Module) -> Iterator[str]:
    here = (-1, "sluice") if module == "__init__" else place(module)
    if here is None:
        yield "has no place in LEVELS"
        return
    for line, name, where in imports(source, tree):
        package, _, target = name.partition(".")
        if not package:
            yield f"line {line} is a relative import, which this test does not read"
        elif package in HOMES:
            at_home = is_below(module, HOMES[package]) and (package != "torch" or module not in NO_TORCH)
            if not at_home and ELSEWHERE.get((module, package)) != where:
                yield f"line {line} imports {package} {where}"
        elif package == "sluice" and target:
            level, room = place(target) or (len(LEVELS), target)
            if (room != here[1] and level >= here[0]) or not is_below(target, ONLY.get(here[1], {target})):
                yield f"line {line} imports {target}"


def test_imports_go_down_only():
    assert violations(SOURCE) == []


def test_every_place_is_taken():
    """A room that is gone leaves no rule behind."""
    assert [name for name in PLACES if not exists(SOURCE, f"sluice.{name}")] == []


PLANTED = {
    "engines/scripted.py": ("from sluice.rollout.buffer import GroupBuffer", "1 imports rollout.buffer"),
    "config.py": ("def load():\n    import sluice.launch", "2 imports launch"),
    "data/chat.py": ("if TYPE_CHECKING:\n    from sluice.engines import embedded", "2 imports engines.embedded"),
    "trainers/local.py": ("from sluice.engines.slots import SlotCache", "1 imports engines.slots"),
    "rewards/rubric.py": ("from sluice.data.chat import Chat", "1 imports data.chat"),
    "rewards/__init__.py": ("from ..data.chat import Chat", "1 is a relative import, which this test does not read"),
    "types.py": ("from sluice import errors", "1 imports errors"),
    "viewer/report.py": ("from sluice.tracking.metrics import Mean", "1 imports tracking.metrics"),
    "viewer/curves.py": ("from sluice.data.chat import Chat", "1 imports data.chat"),
    "analysis/binary_reward.py": ("from sluice.config import TrainConfig", "1 imports config"),
    "analysis/plots.py": ("from sluice.viewer.curves import draw", "1 imports viewer.curves"),
    "analysis/clipped_tokens.py": ("def f():\n    import torch", "2 imports torch in a function"),
    "analysis/output.py": ("import matplotlib", "1 imports matplotlib at the top"),
    "__init__.py": ("from sluice.config import TrainConfig", "1 imports config"),
    "cli.py": ("import sluice.utils", "1 imports utils"),
    "algorithms/spec.py": ("from torch import Tensor", "1 imports torch at the top"),
    "algorithms/__init__.py": ("import torch.nn", "1 imports torch at the top"),
    "rollout/worker.py": ("def f():\n    import torch", "2 imports torch in a function"),
    "launch/models.py": ("import torch", "1 imports torch at the top"),
    "interfaces.py": ("def f():\n    import torch", "2 imports torch in a function"),
    "tracking/console.py": ("import matplotlib.pyplot as plt", "1 imports matplotlib at the top"),
    "launch/placing.py": ("def f():\n    import ray", "2 imports ray in a function"),
    "engines/embedded.py": ("from multiprocessing import Pool", "1 imports multiprocessing at the top"),
}
ALLOWED = {
    "launch/models.py": "def f():\n    import torch\n    from sluice.train import train",
    "interfaces.py": "if TYPE_CHECKING:\n    import torch\n    from sluice.tracking.metrics import Metrics",
    "configfile.py": "from sluice.config import TrainConfig",
    "viewer/report.py": "from sluice.viewer.curves import draw\nfrom sluice.tracking import ledger, rundir",
    "analysis/binary_reward.py": "import torch\nfrom sluice.algorithms import compute_advantages",
    "cli.py": "from sluice import __version__",
    "trainers/local.py": "import torch\nfrom sluice.weights.in_process import InProcessWeights",
}


def complaints(file: str, code: str) -> list[str]:
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return list(complaints_of(module, SOURCE, ast.parse(code)))


@pytest.mark.parametrize("file", PLANTED)
def test_a_planted_import_is_caught(file: str):
    code, complaint = PLANTED[file]
    assert complaints(file, code) == [f"line {complaint}"]


@pytest.mark.parametrize("file", ALLOWED)
def test_what_is_allowed_is_not_caught(file: str):
    assert complaints(file, ALLOWED[file]) == []


def test_every_file_of_a_tree_is_read(tmp_path: Path):
    """Folders and their first files too; a file that nobody gave a place is told."""
    for file in ("rollout/worker.py", "data/__init__.py", "utils.py", "viewer/deep/down.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("from sluice.rollout.worker import rollout_group")
    assert violations(tmp_path) == [
        "data: line 1 imports rollout.worker",
        "utils: has no place in LEVELS",
        "viewer.deep.down: line 1 imports rollout.worker",
    ]
