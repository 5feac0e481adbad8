"""Rollout workers: each takes a ticket, plays a group, has it scored, and hands it in."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace

from sluice.algorithms import why_rejected
from sluice.environments.playing import play
from sluice.errors import (
    DataError,
    EngineError,
    EngineGoneError,
    EnvironmentError_,
    PromptTooLongError,
    boundary,
    first_error,
)
from sluice.rollout.policy import SamplingPolicy
from sluice.rollout.trainable import check_trainable, sound_turns
from sluice.run import Run
from sluice.types import Group, Outcome, Prompt, Trajectory


@asynccontextmanager
async def rollout_workers(run: Run) -> AsyncGenerator[None]:
    """Workers run as long as the block; one that raises ends it, and its exception is what the caller sees."""
    try:
        async with asyncio.TaskGroup() as tasks:
            workers = [tasks.create_task(_worker(run)) for _ in range(run.buffer.num_slots)]
            yield
            for worker in workers:
                worker.cancel()
    except BaseExceptionGroup as errors:
        error = first_error(errors)
        raise error from error.__cause__


async def _worker(run: Run) -> None:
    while True:
        ticket = await run.buffer.admit()
        await run.buffer.put(await rollout_group(run, ticket, run.prompts[ticket]))


async def rollout_group(run: Run, ticket: int, prompt: Prompt) -> Group:
    """All attempts at one prompt, scored; `rejected` says why when it is not to be trained on.

    Raises what ends a run: a filter that raises, a prompt without room unless such prompts are to be skipped, and that there is no
    engine any more.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            attempts = [
                # named like its wait, so that the watchdog can tell which one blocks the event loop
                tasks.create_task(_attempt(run, ticket, prompt, i), name=f"rollout {ticket}.{i}")
                for i in range(run.group_size)
            ]
    except BaseExceptionGroup as errors:
        error = first_error(errors)
        raise error from error.__cause__
    results = [attempt.result() for attempt in attempts]
    for error in results:
        if isinstance(error, PromptTooLongError):
            run.tracker.event("prompt_skipped", f"prompt {prompt.id} ({prompt.where}): {error}")
            return Group(ticket, prompt, [], rejected=f"prompt too long: {error}")
    group = Group(ticket, prompt, [result for result in results if isinstance(result, Trajectory)])
    group.rejected = why_rejected(run.algorithm, group)
    if not group.rejected and run.group_filter is not None:
        with (
            run.waits(f"rollout {ticket}", "rollout.filter", f"prompt {prompt.id}"),
            boundary(EnvironmentError_, f"rollout.filter, on the group of prompt {prompt.id}"),
        ):
            group.rejected = "" if run.group_filter(group) else "rollout.filter"
    _tell_errors(run, group)
    return group


async def _attempt(run: Run, ticket: int, prompt: Prompt, index: int) -> Trajectory | PromptTooLongError:
    """One attempt, scored."""
    with run.waits(f"rollout {ticket}.{index}", "environment", f"prompt {prompt.id}") as wait:
        trajectory = await _played(run, prompt, SamplingPolicy(run, ticket, index, wait))
        # an environment may say itself that it failed; no reward makes that a score
        if isinstance(trajectory, Trajectory) and trajectory.outcome not in ("error", "timeout"):
            await run.rubric.score(prompt, trajectory, wait)
            _add_turn_rewards(trajectory)
    return trajectory


async def _played(run: Run, prompt: Prompt, policy: SamplingPolicy) -> Trajectory | PromptTooLongError:
    """A prompt to be skipped is a value: while an exception is on its way up a TaskGroup, a cancellation gets lost."""

    def failed(reason: str, error: str, outcome: Outcome = "error") -> Trajectory:
        return Trajectory(sound_turns(run, policy.turns), stop_reason=reason, outcome=outcome, error=error)

    try:
        async with asyncio.timeout(run.attempt_timeout_s):
            trajectory = await play(run.environment, prompt, policy)
        with boundary(EnvironmentError_, f"rollout.environment, on prompt {prompt.id}"):
            check_trainable(run, trajectory)
        return trajectory
    except TimeoutError:
        what = (
            f"no end after {run.attempt_timeout_s:g} s (rollout.timeout_s), {len(sound_turns(run, policy.turns))} turns"
        )
        return failed("timeout", f"prompt {prompt.id}: {what}", "timeout")
    except EnvironmentError_ as error:
        return failed("error", str(error))
    except DataError as error:
        if policy.turns:
            return failed("error", f"prompt {prompt.id}: {error}")
        raise DataError(f"prompt {prompt.id} ({prompt.where}): {error}") from error
    except PromptTooLongError as error:
        if policy.turns:  # the prompt had room, and the conversation has outgrown it
            return failed("window", f"prompt {prompt.id}: {error}")
        if run.long_prompts == "skip":
            return error
        raise PromptTooLongError(
            f"prompt {prompt.id} ({prompt.where}): {error}; or skip such prompts with data.long_prompts=skip"
        ) from None
    except EngineGoneError:
        raise
    except EngineError as error:
        tries = f"tried {run.engine_retries + 1} times (rollout.engine_retries)"
        return failed("engine", f"prompt {prompt.id}: {error}; {tries}")


def _add_turn_rewards(trajectory: Trajectory) -> None:
    """What the environment gave for single turns counts in the reward, as the part `turns`; the score comes with the last."""
    if trajectory.reward is None:
        return
    given = [turn.reward for turn in trajectory.turns]
    try:
        earned = [float("nan") if isinstance(reward, str) else float(reward) for reward in given]
    except (TypeError, ValueError):
        earned = [math.nan]
    if not any(earned):
        return
    score = trajectory.reward
    if not math.isfinite(sum(earned) + score):
        trajectory.outcome, trajectory.reward = "error", None
        trajectory.error = f"the turns' rewards {given} and the score {score} do not add up to a finite number"
        return
    earned_parts = [*earned[:-1], earned[-1] + score]
    # new turns: an environment may have listed one twice
    trajectory.turns = [replace(turn, reward=r) for turn, r in zip(trajectory.turns, earned_parts, strict=True)]
    trajectory.reward_parts["turns"] = math.fsum(earned)
    trajectory.reward = math.fsum(earned_parts)


def _tell_errors(run: Run, group: Group) -> None:
    failed = [t for t in group.trajectories if t.outcome != "scored"]
    if failed:
        run.tracker.event(
            "no_score",
            f"prompt {group.prompt.id}: {len(failed)} of {len(group.trajectories)} samples have no score: {failed[0].error}",
            outcomes=[t.outcome for t in failed],
        )
