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
        steps = metrics_of(run)
        assert steps[-1]["train/value_loss"] < steps[0]["train/value_loss"]
    if name == "ppo":  # a head on states that the policy moves under it foresees less
        assert max(step["train/explained_variance"] or 0.0 for step in steps) > 0.2
