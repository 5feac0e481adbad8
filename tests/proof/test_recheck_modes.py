"""The recheck task learns in every mode, with every check of the run on."""

from __future__ import annotations

import shutil
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples/recheck"))

from demo import metrics_of, train
from modes import MODES, RECIPE

ORDINARY = "vllm"
"""Beside it nothing of `make test` has a real vLLM server."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", [m if m == ORDINARY else pytest.param(m, marks=pytest.mark.proof) for m in MODES])
def test_it_reaches_a_reward_of_085(mode: str) -> None:
    """From about 0.3, within 40 steps."""
    if mode.startswith("vllm") and not (ROOT / ".venv-vllm/bin/python").exists():
        pytest.skip("`make vllm` installs vLLM, which this test needs")
    shutil.rmtree(ROOT / "runs" / f"proof-{mode}", ignore_errors=True)
    rewards = [step["rollout/reward"] for step in metrics_of(train(f"proof-{mode}", 0.03, 0, [*RECIPE, *MODES[mode]]))]
    assert rewards[0] < 0.45
    assert rewards[-1] >= 0.85
