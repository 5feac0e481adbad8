"""What `sluice analyze` loads: nothing heavy for its help, and torch only where advantages are computed."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_clipped_tokens import STEP_1, make_run, write_step

from test_public_names import HEAVY, loaded_by


@pytest.mark.parametrize("words", [["--help"], ["binary-reward", "--help"], ["clipped-tokens", "--help"]])
def test_help_loads_nothing_heavy(tmp_path: Path, words: list[str]):
    assert not loaded_by("analyze", *words, folder=tmp_path) & HEAVY


def test_clipped_tokens_load_no_torch(tmp_path: Path):
    """Not for the plot either, whose module draws both analyses."""
    write_step(make_run(tmp_path, "run"), 1, STEP_1)
    words = ("clipped-tokens", "run", "--json", "out.json", "--plot", "out.png")
    loaded = loaded_by("analyze", *words, folder=tmp_path)
    assert "matplotlib" in loaded
    assert "torch" not in loaded


def test_rates_load_no_matplotlib_without_a_plot(tmp_path: Path):
    assert "matplotlib" not in loaded_by("analyze", "binary-reward", folder=tmp_path)
