"""The sections of the config that keep a run safe: checkpoints, checks, the watchdog."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from sluice.configbase import FinitePositive, Section

Severity = Literal["off", "warn", "stop"]


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
    """Go on in the folder of run.name when there is one, as `--resume` does: for jobs that a cluster starts again."""

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


class WatchdogSection(Section):
    warn_after_s: Annotated[float, Field(ge=0.1, allow_inf_nan=False)] | None = 120.0
    """Seconds after which what holds the run up is named, on the console and in events.jsonl; then after twice as many, and so
    on. null: never."""


class ChecksSection(Section):
    weights_match: Severity = "stop"
    """The engine decodes with the weights that the trainer has published."""
    first_update_ratio: Severity = "stop"
    """Engine and trainer give samples of the present weights the same log-probs."""
    staleness: Severity = "stop"
    """No group has a token that is more than rollout.max_staleness versions older than the policy that it trains."""
    trained_once: Severity = "stop"
    """Every group is trained or rejected, once, in order, also across a resume."""
    data_unchanged: Severity = "stop"
    """The data files have the content that they had when the run began."""
    groups_whole: Severity = "stop"
    """Every sample says of its tokens, reward and group what the engine and the reward said."""
    advantages: Severity = "stop"
    """Advantages sum to zero where the algorithm says so, and follow the rewards."""
    loss_mask: Severity = "stop"
    """There is a loss on the tokens that the policy wrote, and on no other."""
    loss_scale: Severity = "stop"
    """Every sample weighs in its update what the aggregation promises."""
    padded_packed: Severity = "stop"
    """The trainer's log-probs of a sample do not depend on the samples beside it."""
    finite: Severity = "stop"
    """No reward, log-prob, value or advantage is nan or infinite, and no log-prob positive."""
    outcome_budget: Severity = "stop"
    """Not more than max_error_share of a step's attempts end without a score."""
    entropy: Severity = "warn"
    """The entropy has neither collapsed nor run away while the reward did not rise."""
    response_length: Severity = "warn"
    """Responses have neither grown into the limit nor shrunk without more reward."""
    repetition: Severity = "warn"
    """Responses have not come to repeat themselves."""
    equal_rewards: Severity = "warn"
    """Not nearly all groups have equal rewards, which carry no signal."""
    max_error_share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of a step's attempts that may end in error or timeout (outcome_budget)."""
    logprob_tolerance: FinitePositive | None = None
    """Nats by which two log-probs of a token may differ in the mean over a batch, five times that over a sample
    (first_update_ratio, padded_packed); left out, 2e-4 for float32 and 0.05 for bfloat16."""

    def severities(self) -> dict[str, Severity]:
        """Of every check, by its name."""
        return {
            name: getattr(self, name) for name, field in type(self).model_fields.items() if field.annotation == Severity
        }


RESUMABLE = (
    *("run.num_steps", "run.stop_at_reward", "run.disk_wait_s", "reward_workers", "rollout.environment_workers"),
    *("trainer.num_ranks", "trainer.num_threads", "trainer.answer_limit_s"),
    *("engine.python", "engine.url", "engine.replicas", "engine.num_threads", "engine.gpus", "engine.publication"),
    *("engine.publication_folder", "engine.max_restarts", "engine.hang_timeout_s", "engine.start_limit_s"),
    *("placement.", "checkpoint.", "checks.", "watchdog."),
)
"""Keys that may be other when a run goes on: none of them changes what was done until then. (Other numbers of ranks
and engines sum in another order, so what follows is the same to rounding only.)"""
