"""What users may rely on: the names of the algorithms room, and commands that start at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sluice.algorithms


def test_the_public_names_of_algorithms():
    assert sluice.algorithms.__all__ == [
        "ALGORITHMS",
        "Algorithm",
        "LossOutput",
        "assign_advantages",
        "compute_advantages",
        "explain",
        "explain_unused",
        "gae",
        "policy_loss",
        "resolve",
        "token_coefficients",
        "value_loss",
        "why_rejected",
    ]
    for name in sluice.algorithms.__all__:
        assert getattr(sluice.algorithms, name)
    with pytest.raises(AttributeError, match="no attribute 'advantage'"):
        sluice.algorithms.advantage  # noqa: B018


PROBE = """
import json, sys
from sluice.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as done:
    status = done.code
loaded = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"status": status, "loaded": loaded}))
"""
HEAVY = {"torch", "transformers", "numpy", "pyarrow", "matplotlib", "tokenizers", "datasets", "sympy"}
SETTINGS = ["model.path=m", "data.path=rows.jsonl", "data.prompt=q", "data.reference=a", "rewards=[{name: math}]"]


def loaded_by(*argv: str, folder: Path) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *argv], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["status"] == 0, done.stdout + done.stderr
    return set(result["loaded"])


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["config", "--help"], ["train", "--help"], ["config", "show", *SETTINGS]],
    ids=lambda argv: " ".join(argv[:2]),
)
def test_help_and_config_start_without_heavy_packages(argv: list[str], tmp_path: Path):
    assert not loaded_by(*argv, folder=tmp_path) & HEAVY


def test_a_config_is_explained_without_loading_torch(tmp_path: Path):
    """`sluice check --offline` has a test of its own."""
    (tmp_path / "rows.jsonl").write_text('{"q": "1 + 1 =", "a": "2"}\n')
    loaded = loaded_by("config", "explain", *SETTINGS, folder=tmp_path)
    assert not loaded & {"torch", "transformers", "matplotlib"}
