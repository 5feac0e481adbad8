"""The sections of the config that keep a run safe: checkpoints, checks, the watchdog."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, model_validator

from sluice.configbase import Section


class CheckpointSection(Section):
    every_steps: PositiveInt | None = 10
    """Steps between checkpoints; one is always written at the end, and null writes no other."""
    keep_last: PositiveInt | None = 3
    """Newest checkpoints that are kept; null keeps all."""
    best_metric: str | None = None
    """Metric, e.g. rollout/reward, whose best checkpoint is kept as well; left out, only the newest are."""
    best: Literal["max", "min"] = "max"
    """Which value of `best_metric` is the best."""
    auto_resume: bool = False
    """Go on in the folder of run.name when there is one, as `sluice train --resume` does: for jobs that a cluster starts again."""

    @model_validator(mode="after")
    def _kept(self) -> CheckpointSection:
        if self.best_metric is not None and self.keep_last is None:
            raise ValueError(
                f"checkpoint.best_metric={self.best_metric} has no effect with checkpoint.keep_last=null, which keeps all; "
                "leave one of the two out"
            )
        if self.best == "min" and self.best_metric is None:
            raise ValueError("checkpoint.best has no effect without checkpoint.best_metric; name the metric")
        return self


RESUMABLE = ("run.num_steps", "run.stop_at_reward", "run.disk_wait_s", "reward_workers", "checkpoint.")
"""Keys that may be other when a run goes on: none of them changes what was done until then."""
