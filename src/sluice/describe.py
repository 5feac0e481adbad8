"""A config in plain words, without anything that takes time to load."""

from __future__ import annotations

from sluice.algorithms import Algorithm, explain, resolve
from sluice.config import LocalTrainer, TrainConfig
from sluice.errors import ConfigError


def algorithm_of(config: TrainConfig) -> Algorithm:
    row = resolve(
        config.algorithm.name,
        config.algorithm.overrides(),
        max_new_tokens=config.rollout.max_new_tokens,
        group_size=config.rollout.group_size,
    )
    if row.ratio == "none" and config.algorithm.old_logprobs == "recomputed":
        raise ConfigError(
            "algorithm.old_logprobs=recomputed has no effect: only a ratio divides by old log-probs, and "
            f"algorithm {row.name} has none; leave it out, or set algorithm.ratio=token"
        )
    return row


def describe(config: TrainConfig) -> str:
    """The batch arithmetic in plain words, and the loss with its bounds."""
    rollout, trainer = config.rollout, config.trainer
    samples, updates = rollout.groups_per_step * rollout.group_size, trainer.updates_per_batch
    share = f"{samples // updates}" + (f" or {samples // updates + 1}" if samples % updates else "")
    cut = ""
    if isinstance(trainer, LocalTrainer):
        cut = f", in micro-batches of at most {trainer.tokens_per_micro_batch} tokens"
    age = f"at most {rollout.max_staleness} updates old" if rollout.max_staleness else "sampled by the newest weights"
    steps = config.run.num_steps
    return "\n".join(
        [
            f"a step     {rollout.groups_per_step} groups × {rollout.group_size} samples = {samples} samples, {age}",
            f"           {updates} optimiser update{'s' * (updates > 1)}, each of {share} samples{cut}",
            f"the run    {steps} steps = {steps * samples} samples and {steps * updates} updates",
            explain(algorithm_of(config), config.algorithm.old_logprobs),
        ]
    )
