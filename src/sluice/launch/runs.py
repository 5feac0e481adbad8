"""Runs from their config to their end. Rooms that load torch are imported when they are needed."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.config import LocalTrainer, RunSection, SftConfig, TrainConfig
from sluice.configfile import Resolved, dump
from sluice.data.chat import Chat, load_tokenizer
from sluice.data.prompts import PromptStream
from sluice.describe import describe
from sluice.errors import DataError
from sluice.interfaces import Tracker
from sluice.launch.checked import check, check_sft
from sluice.launch.models import engine_and_trainer, load_policy, optimizer_of, set_threads
from sluice.rewards.rubric import Rubric
from sluice.rollout.buffer import GroupBuffer, Limits
from sluice.run import Run
from sluice.tracking.console import ConsoleTracker
from sluice.tracking.rundir import RunDir, describe_environment
from sluice.tracking.tracker import FileTracker, Trackers
from sluice.types import Sampling

if TYPE_CHECKING:
    from sluice.checks import Checker


def train(resolved: Resolved[TrainConfig], name: str) -> Path:
    """Run a config to its end and return the run folder. `name` names the run when the config does not."""
    from sluice.train import train as loop

    config, rollout = resolved.config, resolved.config.rollout
    checked = check(config)
    chat = Chat(load_tokenizer(config.model.path))
    chat.encode(checked.prompts[0].messages)  # a missing chat template is told before there is a run folder
    set_threads(config.run)
    engine, trainer, packing, eos_ids = engine_and_trainer(config, checked, chat)
    rundir = _make_rundir(resolved, name)
    rundir.explained.write_text(describe(config) + "\n")
    rubric = Rubric(checked.rewards, config.reward_workers, log=rundir.path / "rewards.log")
    parts = tuple(f"rollout/reward/{spec.label}" for spec in checked.rewards) if len(checked.rewards) > 1 else ()
    tracker = Trackers([FileTracker(rundir, chat.pieces), ConsoleTracker(config.run.num_steps, extra=parts)])
    run = Run(
        engine=engine,
        trainer=trainer,
        environment=checked.environment,
        rubric=rubric,
        chat=chat,
        buffer=GroupBuffer(
            rollout.groups_per_step,
            rollout.max_staleness,
            Limits(rollout.max_rejected_groups or 10 * rollout.groups_per_step, rollout.max_failed_groups),
        ),
        prompts=PromptStream(checked.prompts, config.run.seed, config.data.shuffle),
        algorithm=checked.algorithm,
        packing=packing,
        sampling=Sampling(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            stop=rollout.stop,
            stop_token_ids=eos_ids | frozenset(rollout.stop_token_ids),
        ),
        tracker=tracker,
        rundir=rundir,
        checks=_checker(config),
        seed=config.run.seed,
        num_steps=config.run.num_steps,
        groups_per_step=rollout.groups_per_step,
        group_size=rollout.group_size,
        max_staleness=rollout.max_staleness,
        old_logprobs=config.algorithm.old_logprobs,
        pretrain_steps=config.critic.pretrain_steps,
        update_reference_every=config.reference.update_every_steps,
        long_prompts=config.data.long_prompts,
        group_filter=checked.group_filter,
        attempt_timeout_s=rollout.timeout_s,
        stop_at_reward=config.run.stop_at_reward,
        checkpoint_every=_checkpoint_every(config),
    )

    async def whole() -> None:
        try:
            await rubric.start()
            await loop(run)
        finally:
            await engine.close()
            rubric.close()

    _to_the_end(rundir, tracker, whole())
    return rundir.path


def sft(resolved: Resolved[SftConfig], name: str) -> Path:
    """Fine-tune on given responses and return the run folder."""
    from sluice.checkpoint import save_checkpoint
    from sluice.data.batch import Packing
    from sluice.trainers.local import LocalTrainer as Local
    from sluice.trainers.sft import num_updates, response_sample, train_sft

    config = resolved.config
    rows = check_sft(config)
    chat = Chat(load_tokenizer(config.model.path))
    set_threads(config.run)
    samples = [
        response_sample(i, row.where, chat.encode(row.messages), chat.encode_response(row.response))
        for i, row in enumerate(rows)
    ]
    settings = config.trainer
    packing = Packing(1, settings.tokens_per_micro_batch, settings.layout)
    updates = num_updates(len(samples), settings.samples_per_update, config.run.num_epochs)
    model = load_policy(config, chat)
    trainer = Local(model, chat.tokenizer, optimizer_of(settings, model, updates), packing)
    if longest := max(samples, key=len, default=None):
        _refuse_too_long(longest.prompt_id, len(longest), trainer)
    rundir = _make_rundir(resolved, name)
    tracker = Trackers([FileTracker(rundir, chat.pieces), ConsoleTracker(updates)])

    async def whole() -> None:
        await train_sft(
            trainer,
            samples,
            tracker,
            packing,
            samples_per_update=settings.samples_per_update,
            num_epochs=config.run.num_epochs,
            shuffle_seed=config.run.seed if config.data.shuffle else None,
            log_every=config.run.log_every,
        )
        save_checkpoint(trainer, rundir, updates)

    _to_the_end(rundir, tracker, whole())
    return rundir.path


def _checker(config: TrainConfig) -> Checker:
    from sluice.checks import Checker

    tolerance = 2e-4 if config.model.dtype == "float32" else 0.05
    return Checker(
        {**config.checks.severities(), **dict.fromkeys(config.idle_checks(), "off")},
        logprob_tolerance=config.checks.logprob_tolerance or tolerance,
        max_error_share=config.checks.max_error_share,
    )


def _checkpoint_every(config: TrainConfig) -> int | None:
    if not isinstance(config.trainer, LocalTrainer):
        return None
    return config.checkpoint.every_steps or config.run.num_steps


def _to_the_end(rundir: RunDir, tracker: Tracker, work: Coroutine[Any, Any, None]) -> None:
    """Whatever ends the work, the record stays readable; an error goes to events.jsonl before it goes to the user."""
    from sluice.viewer.report import write_report

    try:
        asyncio.run(work)
    except BaseException as error:
        with suppress(OSError):  # on a full disk; the error itself is what the user must see
            tracker.event("stopped", f"{type(error).__name__}: {error}")
        raise
    finally:
        tracker.close()
        try:
            write_report(rundir.path)
        except DataError:
            pass  # no step was finished, so there is nothing to show
        except Exception as error:  # what ended the work is the news, not that its page could not be written
            print(f"no report.html: {type(error).__name__}: {error}", file=sys.stderr)


def _make_rundir(resolved: Resolved[Any], name: str) -> RunDir:
    run: RunSection = resolved.config.run
    rundir = RunDir.create(run.folder, run.name or f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    rundir.config.write_text(dump(resolved))
    rundir.environment.write_text(json.dumps(describe_environment(), indent=2) + "\n")
    return rundir


def _refuse_too_long(where: str, length: int, trainer: Any) -> None:
    if length > trainer.model.max_length:
        raise DataError(
            f"{where}: prompt and response have {length} tokens, and the model {trainer.model.max_length} positions; "
            "shorten or remove the row"
        )
