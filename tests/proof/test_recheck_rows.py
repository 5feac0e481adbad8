"""PPO with its critic, and REINFORCE++, learn the recheck task as CISPO does."""

from __future__ import annotations

import shutil
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples/recheck"))

from demo import metrics_of, train

ROWS = {
    "ppo": ["critic.learning_rate=3e-4"],
    "ppo_head": ["critic.model=head", "critic.learning_rate=3e-3"],
    "reinforce_pp": [],
    "reinforce_pp_baseline": [],
}


@pytest.mark.proof
@pytest.mark.parametrize("name", ROWS)
def test_the_row_reaches_a_reward_of_08(name: str) -> None:
    """From about 0.3, within 24 steps."""
    settings = [f"algorithm.name={name.removesuffix('_head')}", *ROWS[name]]
    settings += ["trainer.learning_rate=1e-4", "run.num_steps=24", "run.stop_at_reward=0.8", "run.num_threads=1"]
    shutil.rmtree(ROOT / "runs" / f"proof-{name}", ignore_errors=True)
    run = train(f"proof-{name}", 0.03, 0, settings)
    rewards = [step["rollout/reward"] for step in metrics_of(run)]
    assert rewards[0] < 0.45
    assert rewards[-1] >= 0.8
    if name.startswith("ppo"):
        last = metrics_of(run)[-1]
        assert last["train/explained_variance"] > 0.1
        assert last["train/value_loss"] < metrics_of(run)[0]["train/value_loss"]
