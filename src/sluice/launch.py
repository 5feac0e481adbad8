"""From a config to a run: the only file that knows every room. Rooms that load torch are imported when they are needed."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.algorithms import Algorithm
from sluice.config import FileData, LocalTrainer, RunSection, ScriptedEngine, SftConfig, TrainConfig
from sluice.config import reward_label as label_of
from sluice.configfile import Resolved, dump
from sluice.configtraining import OptimizerSection
from sluice.data.chat import Chat, load_tokenizer
from sluice.data.prompts import PromptSet, PromptStream, SftSet, load_prompts, load_sft_rows
from sluice.data.sources import Rows, open_rows
from sluice.describe import algorithm_of, describe
from sluice.environments.single_turn import single_turn
from sluice.errors import ConfigError, DataError
from sluice.hooks import resolve as resolve_hook
from sluice.interfaces import Tracker
from sluice.rewards.rubric import Rubric
from sluice.rewards.spec import RewardSpec, build
from sluice.rollout.buffer import GroupBuffer, Limits
from sluice.run import Run
from sluice.tracking.console import ConsoleTracker
from sluice.tracking.rundir import RunDir, describe_environment
from sluice.tracking.tracker import FileTracker, Trackers
from sluice.types import Sampling

if TYPE_CHECKING:
    from sluice.data.batch import Packing
    from sluice.interfaces import Engine, Trainer
    from sluice.trainers.local import LocalTrainer as Local
    from sluice.trainers.model import PolicyModel
    from sluice.trainers.optim import Optimizer, OptimizerSettings


@dataclass
class Checked:
    """All that can be known of a config without loading a model."""

    algorithm: Algorithm
    prompts: PromptSet
    rewards: list[RewardSpec]
    environment: Callable[..., Any]
    group_filter: Callable[..., Any] | None
    script: Callable[..., Any] | None


def check(config: TrainConfig) -> Checked:
    """Resolve every name and read every data row. Raises ConfigError or DataError."""
    rollout, engine = config.rollout, config.engine
    return Checked(
        algorithm=algorithm_of(config),
        rewards=[_checked_reward(reward) for reward in config.rewards],
        environment=single_turn
        if rollout.environment == "single_turn"
        else _hook("rollout.environment", rollout.environment, "prompt", "policy", awaited=True),
        group_filter=_hook("rollout.filter", rollout.filter, "group") if rollout.filter else None,
        script=_hook("engine.script", engine.script, "prompt_ids", "sampling")
        if isinstance(engine, ScriptedEngine)
        else None,
        prompts=load_prompts(
            _rows(config.data),
            prompt=config.data.prompt,
            reference=config.data.reference,
            reference_pattern=config.data.reference_pattern,
            id=config.data.id,
            metadata=config.data.metadata,
            system_prompt=config.data.system_prompt,
        ),
    )


def check_sft(config: SftConfig) -> SftSet:
    """Read every row. Raises DataError."""
    data = config.data
    return load_sft_rows(_rows(data), prompt=data.prompt, response=data.response, system_prompt=data.system_prompt)


def train(resolved: Resolved[TrainConfig], name: str) -> Path:
    """Run a config to its end and return the run folder. `name` names the run when the config does not."""
    from sluice.train import train as loop

    config, rollout = resolved.config, resolved.config.rollout
    checked = check(config)
    chat = Chat(load_tokenizer(config.model.path))
    chat.encode(checked.prompts[0].messages)  # a missing chat template is told before there is a run folder
    _set_threads(config.run)
    engine, trainer, packing, eos_ids = _engine_and_trainer(config, checked, chat)
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
    _set_threads(config.run)
    samples = [
        response_sample(i, row.where, chat.encode(row.messages), chat.encode_response(row.response))
        for i, row in enumerate(rows)
    ]
    settings = config.trainer
    packing = Packing(1, settings.tokens_per_micro_batch, settings.layout)
    updates = num_updates(len(samples), settings.samples_per_update, config.run.num_epochs)
    model = _load(config, chat)
    trainer = Local(model, chat.tokenizer, _optimizer(settings, model, updates), packing)
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


def _engine_and_trainer(
    config: TrainConfig, checked: Checked, chat: Chat
) -> tuple[Engine, Trainer, Packing, frozenset[int]]:
    from sluice.data.batch import Packing

    if isinstance(config.trainer, LocalTrainer):
        packing = Packing(
            config.trainer.updates_per_batch, config.trainer.tokens_per_micro_batch, config.trainer.layout
        )
        trainer = _policy_trainer(config, checked.algorithm, chat, packing)
        model, eos_ids = trainer.model, chat.eos_ids | trainer.model.eos_ids
    else:
        from sluice.trainers.dry import DryTrainer

        packing = Packing(config.trainer.updates_per_batch, 2**20, "rows")
        trainer, model, eos_ids = DryTrainer(), None, chat.eos_ids
    if isinstance(config.engine, ScriptedEngine):
        from sluice.engines.scripted import ScriptedEngine as Scripted

        assert checked.script is not None
        scripted = Scripted(
            checked.script, max_model_len=config.engine.max_model_len, max_delay_s=config.engine.max_delay_s
        )
        return scripted, trainer, packing, eos_ids

    from sluice.engines.embedded import EmbeddedEngine

    assert model is not None  # the config refuses an embedded engine beside a dry trainer
    if config.engine.max_model_len and config.engine.max_model_len > model.max_length:
        raise ConfigError(
            f"engine.max_model_len={config.engine.max_model_len} is longer than the {model.max_length} positions of the "
            "model; lower it, or leave it out"
        )
    if unknown := [i for i in config.rollout.stop_token_ids if i >= model.config.vocab_size]:
        raise ConfigError(
            f"rollout.stop_token_ids: {unknown[0]} is not among the {model.config.vocab_size} ids of the model"
        )
    window = config.engine.max_model_len or model.max_length
    if config.rollout.max_new_tokens >= window:
        raise ConfigError(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} leaves no room for a prompt in the window of {window} "
            "tokens (engine.max_model_len, or else the model's positions); lower it"
        )
    embedded = EmbeddedEngine(
        model,
        chat.decode,
        vocab_size=model.config.vocab_size,
        num_slots=config.engine.num_slots,
        max_model_len=config.engine.max_model_len,
        prefill_tokens=config.engine.prefill_tokens,
    )
    return embedded, trainer, packing, eos_ids


def _policy_trainer(config: TrainConfig, algorithm: Algorithm, chat: Chat, packing: Packing) -> Local:
    """With the reference and the critic that the algorithm needs."""
    from sluice.trainers.critic import Critic
    from sluice.trainers.local import LocalTrainer as Local

    settings, critic = config.trainer, config.critic
    assert isinstance(settings, LocalTrainer)
    updates = config.run.num_steps * settings.updates_per_batch
    model = _load(config, chat)
    reference = _reference(config, chat, model) if algorithm.needs_reference else None
    has_own = algorithm.needs_values and critic.model == "own"
    own = _second(config, chat, "critic.path", critic.path, model) if has_own else None
    return Local(
        model,
        chat.tokenizer,
        _optimizer(settings, model, updates - critic.pretrain_steps * settings.updates_per_batch),
        packing,
        reference=reference,
        critic=Critic(model, own, _optimizer_settings(critic), updates, critic.value_clip)
        if algorithm.needs_values
        else None,
        entropy_gradient=algorithm.entropy_coef > 0,
    )


def _load(config: TrainConfig | SftConfig, chat: Chat, key: str = "model.path", path: str | None = None) -> PolicyModel:
    """The policy's model, or a second one of the run: from the `path` that `key` names, or else one that begins as the policy."""
    from sluice.trainers.model import load_model

    settings = config.model
    key = key if path else "model.path"
    model = load_model(
        path or settings.path,
        key=key,
        dtype=settings.dtype,
        device=settings.device,
        random_weights=settings.random_weights and not path,
        seed=config.run.seed,
    )
    if len(chat.tokenizer) > model.config.vocab_size:
        raise ConfigError(
            f"{key}={path or settings.path}: the tokeniser has {len(chat.tokenizer)} tokens and the model "
            f"{model.config.vocab_size}; they do not belong together"
        )
    return model


def _second(config: TrainConfig, chat: Chat, key: str, path: str | None, policy: PolicyModel) -> PolicyModel:
    """A reference or a critic: it sees the policy's tokens, at the policy's positions."""
    model = _load(config, chat, key, path)
    window = config.engine.max_model_len or policy.max_length
    if model.config.vocab_size < policy.config.vocab_size or model.max_length < window:
        raise ConfigError(
            f"{key}={path}: {model.config.vocab_size} ids and {model.max_length} positions are fewer than the "
            f"{policy.config.vocab_size} ids of the policy or the {window} positions of its window"
        )
    has_tokenizer = path is not None and any(Path(path).expanduser().glob("tokenizer*"))
    if path and has_tokenizer and load_tokenizer(path).get_vocab() != chat.tokenizer.get_vocab():
        raise ConfigError(
            f"{key}={path}: its tokeniser has other tokens than the one of model.path={config.model.path}"
        )
    return model


def _reference(config: TrainConfig, chat: Chat, policy: PolicyModel) -> PolicyModel:
    reference = _second(config, chat, "reference.path", config.reference.path, policy)
    if config.reference.update_every_steps and reference.architecture() != policy.architecture():
        raise ConfigError(
            f"reference.update_every_steps copies the policy into the reference, and reference.path={config.reference.path} has "
            "another architecture; leave one of the two out"
        )
    return reference


def _optimizer(settings: OptimizerSection, model: PolicyModel, num_updates: int) -> Optimizer:
    from sluice.trainers.optim import Optimizer

    return Optimizer(model.model, _optimizer_settings(settings), num_updates)


def _optimizer_settings(settings: OptimizerSection) -> OptimizerSettings:
    from sluice.trainers.optim import OptimizerSettings

    return OptimizerSettings(**{field.name: getattr(settings, field.name) for field in fields(OptimizerSettings)})


def _refuse_too_long(where: str, length: int, trainer: Local) -> None:
    if length > trainer.model.max_length:
        raise DataError(
            f"{where}: prompt and response have {length} tokens, and the model {trainer.model.max_length} positions; "
            "shorten or remove the row"
        )


def _hook(key: str, dotted: str, *arguments: str, awaited: bool = False) -> Callable[..., Any]:
    try:
        return resolve_hook(dotted, arguments, awaited=awaited)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _rows(data: FileData) -> Rows:
    return open_rows(data.path, data.format, data.split)


def _checked_reward(reward: Any) -> RewardSpec:
    arguments = reward.model_dump(exclude={"name", "label", "weight", "timeout_s"})
    spec = RewardSpec(label_of(reward), reward.name, reward.weight, reward.timeout_s, arguments)
    build(spec)
    return spec


def _set_threads(run: RunSection) -> None:
    if run.num_threads is not None:
        import torch

        torch.set_num_threads(run.num_threads)
