"""`sluice replay`: from a run folder to a trainer that stands where the run stood, and what it finds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.config import DryTrainer, FsdpTrainer, LocalTrainer, TrainConfig
from sluice.configfile import load
from sluice.data.chat import Chat, load_tokenizer
from sluice.describe import algorithm_of
from sluice.errors import ConfigError, DataError
from sluice.launch.checked import checked_reward
from sluice.launch.cores import trainer_threads
from sluice.launch.models import (
    optimizer_settings,
    packing_of,
    policy_trainer,
    set_up_process,
)
from sluice.launch.placing import Placement
from sluice.launch.ranks import ranked_trainer
from sluice.launch.resuming import config_of, differences
from sluice.rewards.rubric import Rubric
from sluice.tracking import ledger
from sluice.tracking.rundir import RunDir

if TYPE_CHECKING:
    from sluice.interfaces import Trainer
    from sluice.replay import Replay, Replayed

OTHER = ("algorithm.", "trainer.")
"""Keys of which a replay can ask: what if."""


def replay(folder: str, first: int, last: int, algorithm: str | None, settings: Sequence[str]) -> list[Replayed]:
    """Replay the steps `first` to `last`, from the newest whole checkpoint before them or else from the first step.

    With an `algorithm` (a row of the table, without the words that the run had changed) or `settings`, the last step alone is
    made with those.
    """
    from sluice.replay import replay_step

    rundir = RunDir(Path(folder))
    config = config_of(rundir)
    _check_steps(rundir, first, last)
    other = _other(rundir, config, algorithm, settings)
    set_up_process(trainer_threads(config))

    async def whole() -> list[Replayed]:
        replay = _restored(rundir, config, other, first)
        outcomes: list[Replayed] = []
        try:
            while replay.step < last:
                if replay.step == last - 1 and other != config:
                    _change(replay, other)
                outcomes.append(await replay_step(replay, rundir))
        finally:
            await replay.trainer.close()
        return [outcome for outcome in outcomes if outcome.step >= first or outcome.difference]

    return asyncio.run(whole())


def score_again(folder: str, first: int, last: int) -> tuple[int, list[str]]:
    """Score the recorded responses of the steps again: how many there were, and a line for each score that is another."""
    from sluice.replay import disagreement, recorded_trajectories

    rundir = RunDir(Path(folder))
    config = config_of(rundir)
    _check_steps(rundir, first, last)
    rubric = Rubric([checked_reward(reward) for reward in config.rewards], config.reward_workers)
    chat = Chat(load_tokenizer(config.model.path))

    async def whole() -> tuple[int, list[str]]:
        await rubric.start()
        count, lines = 0, []
        for step in range(first, last + 1):
            trajectories = recorded_trajectories(rundir, step, chat)
            await asyncio.gather(*(rubric.score(prompt, trajectory) for prompt, trajectory, _ in trajectories))
            count += len(trajectories)
            for prompt, trajectory, row in trajectories:
                if what := disagreement(row, trajectory):
                    lines.append(f"step {step}, sample {prompt.id}#{row['group']}.{row['index']}: {what}")
        return count, lines

    try:
        return asyncio.run(whole())
    finally:
        rubric.close()


def _check_steps(rundir: RunDir, first: int, last: int) -> None:
    recorded = ledger.steps(rundir)
    if missing := sorted({first, last} - {*recorded}):
        raise DataError(
            f"step {missing[0]} is not in the ledger of {rundir.path}"
            + (f", which has the steps {recorded[0]} to {recorded[-1]}" if recorded else ", which is empty")
        )


def _restored(rundir: RunDir, config: TrainConfig, other: TrainConfig, first: int) -> Replay:
    """With the models that both configs need, before the step `first`."""
    from sluice.checkpoint import read_newest
    from sluice.replay import Replay

    chat = Chat(load_tokenizer(config.model.path))
    row, other_row = algorithm_of(config), algorithm_of(other)
    packing = packing_of(config)
    richer = other if other_row.needs_reference and not row.needs_reference else config
    trainer: Trainer = (
        ranked_trainer(config, row, chat, packing, Placement())[0]
        if isinstance(config.trainer, FsdpTrainer)
        else policy_trainer(richer, algorithm_of(richer), chat, packing)
    )
    saved, damage = read_newest(rundir, before=first)
    for message in damage:
        print(message)
    if saved:
        trainer.restore(str(saved.folder), saved.trainer)
    return Replay(
        trainer=trainer,
        algorithm=row,
        packing=packing,
        old_logprobs=config.algorithm.old_logprobs,
        pretrain_steps=config.critic.pretrain_steps,
        update_reference_every=config.reference.update_every_steps,
        step=saved.step if saved else 0,
    )


def _change(replay: Replay, other: TrainConfig) -> None:
    trainer: Any = replay.trainer
    assert isinstance(other.trainer, LocalTrainer)
    replay.algorithm, replay.old_logprobs = algorithm_of(other), other.algorithm.old_logprobs
    replay.packing = trainer.packing = packing_of(other)
    trainer.optimizer.use(optimizer_settings(other.trainer))
    trainer.couples_tokens = replay.algorithm.couples_tokens
    trainer.entropy_gradient = replay.algorithm.entropy_coef > 0


def _other(rundir: RunDir, config: TrainConfig, algorithm: str | None, settings: Sequence[str]) -> TrainConfig:
    """The config of the run with another algorithm and settings. Raises ConfigError for what a replay cannot change."""
    if isinstance(config.trainer, DryTrainer):
        raise ConfigError(
            f"{rundir.path} was run with trainer.name={config.trainer.name}, which updates nothing to replay"
        )
    row = []
    if algorithm:
        row = [f"algorithm.name={algorithm}", *(f"algorithm.{key}=null" for key in config.algorithm.overrides())]
    other = load(TrainConfig, [str(rundir.config)], [*row, *settings]).config
    if wrong := [what for what in differences(config, other) if not what.startswith(OTHER)]:
        raise ConfigError(f"a replay can change the keys of {' and '.join(OTHER)} only: {wrong[0]}")
    if isinstance(config.trainer, FsdpTrainer) and other != config:
        raise ConfigError(
            f"{rundir.path} was run with trainer.name=fsdp, whose steps can be replayed as they were, and not with other settings"
        )
    if algorithm_of(config).needs_values != algorithm_of(other).needs_values:
        raise ConfigError(
            "a replay cannot change between advantage: gae and another: the critic of the one is not in the record of the other"
        )
    return other
