"""Runs from their config to their end. Rooms that load torch are imported when they are needed."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.config import FsdpTrainer, RolloutSection, RunSection, SftConfig, TrainConfig
from sluice.configfile import Resolved, dump
from sluice.data.chat import Chat, load_tokenizer
from sluice.data.prompts import PromptStream
from sluice.describe import describe
from sluice.engines.router import Router
from sluice.environments.processes import EnvironmentProcesses
from sluice.errors import DataError, RunStopped, SluiceError, notes
from sluice.interfaces import Tracker
from sluice.launch.checked import Checked, check, check_sft
from sluice.launch.cores import crowding, trainer_threads
from sluice.launch.models import (
    Parts,
    adapted,
    engine_and_trainer,
    load_policy,
    optimizer_of,
    set_up_process,
    trained,
)
from sluice.launch.placing import Placement, placement_of
from sluice.launch.reachable import check_engine
from sluice.launch.resuming import SettingsTracker, config_of, differences, nothing_left, resumable
from sluice.launch.telling import trackers, watchdog
from sluice.rewards.rubric import Rubric
from sluice.rollout.buffer import GroupBuffer, Limits
from sluice.run import Run
from sluice.threads import DaemonThreads
from sluice.tracking import ledger
from sluice.tracking.lock import locked
from sluice.tracking.rundir import RunDir, describe_environment, patiently, write_atomically
from sluice.tracking.set_aside import set_aside
from sluice.tracking.tracker import Trackers
from sluice.types import Sampling

if TYPE_CHECKING:
    from sluice.checkpoint import Checkpoints, Saved
    from sluice.checks import Checker


def train(resolved: Resolved[TrainConfig], name: str, resume: RunDir | None = None) -> Path:
    """Run a config to its end and return the run folder. `name` names the run when the config does not.

    With `resume`, or with checkpoint.auto_resume and a folder of that name, it goes on from the newest whole checkpoint there.
    Raises RunStopped when it was asked to leave, with a checkpoint on disk.
    """
    from sluice.checkpoint import read_newest, seed_random_state

    config = resolved.config
    resume = resume or resumable(config)
    with ExitStack() as stack:
        if resume:
            stack.enter_context(locked(resume))
        checked = check(config)
        chat = Chat(load_tokenizer(config.model.path))
        chat.encode(checked.prompts[0].messages)  # a missing chat template is told before there is a run folder
        saved, damage = read_newest(resume) if resume else (None, [])
        if resume and saved and saved.is_end_of(config.run.num_steps, config.run.stop_at_reward):
            print(nothing_left(resume, saved.step, config))
            return resume.path
        if crowded := crowding(config):
            print(f"warning: {crowded}", file=sys.stderr)
        check_engine(config)
        set_up_process(trainer_threads(config))
        placement = stack.enter_context(placement_of(config))
        parts = engine_and_trainer(config, checked, chat, placement)
        rundir = resume or _make_rundir(resolved, name, config.checkpoint.auto_resume)
        if not resume:
            stack.enter_context(locked(rundir))
            rundir.explained.write_text(describe(config) + "\n")
            write_atomically(rundir.config, dump(resolved).encode())
        run = _assembled(config, checked, chat, placement, parts, rundir, saved)
        seed_random_state(config.run.seed)
        if resume:
            changes = [*differences(config_of(resume), config)]
            if changes:
                assert isinstance(run.tracker, Trackers)
                run.tracker.insert(1, SettingsTracker(resume, resolved, saved.step if saved else 0, run.tracker.event))
            _go_on(run, saved, damage, changes)
        _to_the_end(rundir, run.tracker, _whole(run, config), resumable=True)
    return rundir.path


def sft(resolved: Resolved[SftConfig], name: str) -> Path:
    """Fine-tune on given responses and return the run folder."""
    from sluice.checkpoint import write_checkpoint
    from sluice.data.batch import Packing
    from sluice.trainers.local import LocalTrainer as Local
    from sluice.trainers.sft import CROSS_ENTROPY, num_updates, response_sample, train_sft

    config = resolved.config
    rows = check_sft(config)
    chat = Chat(load_tokenizer(config.model.path))
    set_up_process(config.run.num_threads)
    samples = [
        response_sample(i, row.where, chat.encode(row.messages), chat.encode_response(row.response))
        for i, row in enumerate(rows)
    ]
    settings = config.trainer
    packing = Packing(1, settings.tokens_per_micro_batch, settings.layout)
    updates = num_updates(len(samples), settings.samples_per_update, config.run.num_epochs)
    model = trained(adapted(load_policy(config, chat), settings, config.run.seed), settings)
    optimizer = optimizer_of(settings, model, updates)
    trainer = Local(model, chat.tokenizer, optimizer, packing, couples_tokens=CROSS_ENTROPY.couples_tokens)
    if longest := max(samples, key=len, default=None):
        _refuse_too_long(longest.prompt_id, len(longest), trainer)
    rundir = _make_rundir(resolved, name)
    write_atomically(rundir.config, dump(resolved).encode())
    tracker = trackers(config, rundir, chat, updates)

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
        write = trainer.snapshot()
        patiently(
            lambda: write_checkpoint(rundir, updates, write, {"metric": None}),
            f"checkpoint {rundir.checkpoint(updates)}",
            config.run.disk_wait_s,
            lambda message: tracker.event("disk_full", message),
        )

    with locked(rundir):
        _to_the_end(rundir, tracker, whole(), resumable=False)
    return rundir.path


def _assembled(
    config: TrainConfig,
    checked: Checked,
    chat: Chat,
    placement: Placement,
    parts: Parts,
    rundir: RunDir,
    saved: Saved | None,
) -> Run:
    """All of a run but its state, of which only the buffer has its own from the beginning."""
    engine: Any = parts.engine
    trainer: Any = parts.trainer
    rollout = config.rollout
    prompts = PromptStream(checked.prompts, config.run.seed, config.data.shuffle)
    if saved:
        prompts.check_identity(saved.position["prompts"])
    limits = Limits(rollout.max_rejected_groups or 10 * rollout.groups_per_step, rollout.max_failed_groups)
    labels = [spec.label for spec in checked.rewards]
    tracker = trackers(config, rundir, chat, config.run.num_steps, labels if len(labels) > 1 else [])
    if isinstance(engine, Router):
        engine.belongs_to(rundir.path, tracker.event)
    if isinstance(config.trainer, FsdpTrainer):
        trainer.belongs_to(rundir.path)
    return Run(
        engine=engine,
        trainer=trainer,
        environment=_environment(config, checked, placement, rundir, tracker),
        rubric=Rubric(checked.rewards, config.reward_workers, log=rundir.path / "rewards.log", launch=placement.reward),
        chat=chat,
        buffer=GroupBuffer(
            rollout.groups_per_step, rollout.max_staleness, limits, saved.buffer_state(prompts) if saved else None
        ),
        prompts=prompts,
        algorithm=checked.algorithm,
        packing=parts.packing,
        sampling=_sampling(rollout, parts.eos_ids),
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
        engine_retries=rollout.engine_retries,
        vocab_size=parts.vocab_size,
        max_length=parts.max_length,
        routing=parts.routing,
        stop_at_reward=config.run.stop_at_reward,
        checkpoints=_checkpoints(config, rundir, tracker),
        meters=[engine.drain_metrics] if isinstance(engine, Router) else [],
    )


def _environment(
    config: TrainConfig, checked: Checked, placement: Placement, rundir: RunDir, tracker: Tracker
) -> Callable[..., Any]:
    rollout = config.rollout
    if not rollout.environment_workers:
        return checked.environment
    log = rundir.path / "environments.log"
    return EnvironmentProcesses(
        rollout.environment, rollout.environment_workers, log, placement.environment, tracker.event
    )


def _sampling(rollout: RolloutSection, eos_ids: frozenset[int]) -> Sampling:
    return Sampling(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=rollout.stop,
        stop_token_ids=eos_ids | frozenset(rollout.stop_token_ids),
    )


def _checkpoints(config: TrainConfig, rundir: RunDir, tracker: Trackers) -> Checkpoints:
    from sluice.checkpoint import Checkpoints

    settings = config.checkpoint
    return Checkpoints(
        rundir,
        every_steps=settings.every_steps,
        keep_last=settings.keep_last,
        best_metric=settings.best_metric,
        best=settings.best,
        disk_wait_s=config.run.disk_wait_s,
        tell=tracker.event,
    )


def _go_on(run: Run, saved: Saved | None, damage: Sequence[str], changes: Sequence[str]) -> None:
    """Put trainer and checks where the checkpoint was written, and what was recorded later out of the way."""
    from sluice.checkpoint import restore_random_state

    for message in damage:
        run.tracker.event("checkpoint_damaged", f"{message}; the one before it is taken")
    if saved:
        run.step = saved.step
        run.trainer.restore(str(saved.folder), saved.trainer)
        run.checks.load_state_dict(saved.position["checks"])
        restore_random_state(saved.rng)
    aside = set_aside(run.rundir, run.step)
    if missing := sorted({*range(1, run.step + 1)} - {*ledger.steps(run.rundir)}):
        run.tracker.event(
            "record_incomplete", f"the ledger lacks {len(missing)} steps before the checkpoint, first {missing[0]}"
        )
    where = f"checkpoint {saved.folder}" if saved else "the first step: there is no checkpoint"
    later = f"; what was recorded after it is in {aside}" if aside else ""
    other = "".join(f"; {change}" for change in changes)
    run.tracker.event("resumed", f"from {where}{later}{other}", step=run.step, environment=describe_environment())


async def _whole(run: Run, config: TrainConfig) -> None:
    asyncio.get_running_loop().set_default_executor(DaemonThreads())
    with watchdog(run, config).watching():
        try:
            await _work(run)
        finally:
            with run.waits("the run", "last checkpoint"):
                await _finish_checkpoint(run)
            with run.waits("the run", "its processes ending"):
                await run.engine.close()
                await run.trainer.close()
                run.rubric.close()
                if isinstance(run.environment, EnvironmentProcesses):
                    await run.environment.close()


async def _finish_checkpoint(run: Run) -> None:
    """What ended the work is the news, and that a checkpoint could not be written besides is an event."""
    if run.checkpoints.is_writing:
        print("a checkpoint is still being written; Ctrl-C ends without it", flush=True)
    try:
        await run.checkpoints.finish()
    except SluiceError as error:
        run.tracker.event("checkpoint_failed", str(error))


async def _work(run: Run) -> None:
    from sluice.train import train as loop

    gc.collect()
    gc.freeze()  # all that is loaded by now stays; full collections would look at it again in every step
    try:
        with _stopping_on_sigterm(run):
            with run.waits("the run", "reward processes starting"):
                await run.rubric.start()
            if isinstance(run.environment, EnvironmentProcesses):
                with run.waits("the run", "environment processes starting"):
                    await run.environment.start()
            await loop(run)
            with run.waits("the run", "last checkpoint"):
                await run.checkpoints.finish()
    except RunStopped:
        if run.step:
            with run.waits("the run", "last checkpoint"):
                await run.checkpoints.save_now(run)
        raise RunStopped(
            f"stopped by SIGTERM after step {run.step}; to go on: sluice train --resume {run.rundir.path}"
        ) from None
    finally:
        gc.unfreeze()


@contextmanager
def _stopping_on_sigterm(run: Run) -> Generator[None]:
    """The first SIGTERM lets an update that has begun end, and no other begin; the second one ends the process."""
    from sluice.checkpoint import note_unfinished

    async def leave() -> None:
        print("SIGTERM: the run ends when what it has begun is done; once more ends it at once", flush=True)
        try:
            await note_unfinished(run)  # before the workers end, and what they asked for with them
        finally:
            await run.buffer.stop()

    loop = asyncio.get_running_loop()
    stopping: list[asyncio.Task[None]] = []

    def stop(*_: object) -> None:  # not a handler of the loop's own: user code may block the loop
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        loop.call_soon_threadsafe(lambda: stopping.append(loop.create_task(leave())))

    if threading.current_thread() is not threading.main_thread():  # only the main thread may have handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _checker(config: TrainConfig) -> Checker:
    from sluice.checks import Checker

    tolerance = 2e-4 if config.model.dtype == "float32" else 0.05
    return Checker(
        {**config.checks.severities(), **dict.fromkeys(config.idle_checks(), "off")},
        logprob_tolerance=config.checks.logprob_tolerance or tolerance,
        max_error_share=config.checks.max_error_share,
    )


def _to_the_end(rundir: RunDir, tracker: Tracker, work: Coroutine[Any, Any, None], resumable: bool) -> None:
    """Whatever ends the work, the record stays readable; an error goes to events.jsonl before it goes to the user."""
    from sluice.viewer.report import write_report

    try:
        asyncio.run(work)
    except BaseException as error:
        what = str(error) if isinstance(error, SluiceError) else f"{type(error).__name__}: {error}".removesuffix(": ")
        if resumable and not isinstance(error, RunStopped):
            how = "to go on" if rundir.checkpoint_folders() else "to begin again, since there is no checkpoint yet"
            error.add_note(f"{how}: sluice train --resume {rundir.path}")
        tracker.event("stopped", "; ".join([what, *notes(error)]))
        raise
    finally:
        tracker.close()
        try:
            write_report(rundir.path)
        except DataError:
            pass  # no step was finished, so there is nothing to show
        except Exception as error:  # what ended the work is the news, not that its page could not be written
            print(f"no report.html: {type(error).__name__}: {error}", file=sys.stderr)


def _make_rundir(resolved: Resolved[Any], name: str, adopt: bool = False) -> RunDir:
    run: RunSection = resolved.config.run
    rundir = RunDir.create(run.folder, run.name, adopt) if run.name else RunDir.create_stamped(run.folder, name)
    rundir.environment.write_text(json.dumps(describe_environment(), indent=2) + "\n")
    return rundir


def _refuse_too_long(where: str, length: int, trainer: Any) -> None:
    if length > trainer.model.max_length:
        raise DataError(
            f"{where}: prompt and response have {length} tokens, and the model {trainer.model.max_length} positions; "
            "shorten or remove the row"
        )
