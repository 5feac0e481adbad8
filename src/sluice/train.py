"""The loop."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

from sluice.data.batch import Minibatch
from sluice.data.samples import to_samples
from sluice.errors import CheckError, NonFiniteError, RolloutError
from sluice.rollout.metrics import annotation_metrics, first_update_metrics, repetition, rollout_metrics
from sluice.rollout.worker import rollout_workers
from sluice.run import Run
from sluice.tracking.metrics import Last, Mean, Metrics
from sluice.types import Group, Sample
from sluice.update import prepare, update
from sluice.waits import Wait


async def train(run: Run) -> None:
    """Sample groups, turn rewards into advantages, step the policy, publish its weights.

    Sync, async and distributed runs differ in what `run` was built from, never in this function.
    """
    await publish(run)
    async with rollout_workers(run):  # a worker that raises ends the run
        while run.step < run.num_steps:
            with run.timer("rollout", queued=True), rejected_on_record(run):
                groups = await run.buffer.take(run.groups_per_step)  # oldest first
            everything = [*groups, *run.buffer.drain_rejected()]
            samples = to_samples(groups)
            with saved_on_failure(run, everything, samples):
                with run.timer("checks"):
                    run.checks.taken(run, everything, samples)
                with run.timer("train") as wait:
                    stats = await learn(run, samples, wait)
                run.step += 1
                await publish(run)
            run.checkpoints.step_ended()
            if run.step < run.num_steps:
                await run.buffer.release(len(groups))  # only now may new groups start: none is born stale
            await after_step(run, everything, samples, stats)


async def learn(run: Run, samples: Sequence[Sample], wait: Wait) -> Metrics:
    """Log-probs, advantages and all updates of a step, with the checks in between."""
    minibatches = await prepare(run, samples)
    with run.timer("checks"):
        await run.checks.assigned(run, samples, minibatches)

    def told() -> Iterator[Minibatch]:
        for number, minibatch in enumerate(minibatches, start=1):
            wait.at("train", f"update {number} of {len(minibatches)}")
            yield minibatch

    def before_the_weights_move(minibatch: Minibatch) -> None:
        if minibatch.index == 0:
            with run.timer("checks"):
                run.checks.first_update(run, samples)

    return await update(run, told(), before_the_weights_move)


async def publish(run: Run) -> None:
    """Give the engine the weights of the step, and see that it has them."""
    with run.timer("publish"):
        run.published_bytes = await run.engine.update_weights(run.trainer.weights(), run.step)
        run.fingerprint = await run.trainer.fingerprint()
    with run.timer("checks"):
        await run.checks.published(run)


@contextmanager
def rejected_on_record(run: Run) -> Generator[None]:
    """When too many groups are rejected, those that were go to the ledger, so that one can see why."""
    try:
        yield
    except RolloutError:
        run.tracker.log_groups(run.step + 1, run.buffer.drain_rejected(), [])
        raise


@contextmanager
def saved_on_failure(run: Run, groups: Sequence[Group], samples: Sequence[Sample]) -> Generator[None]:
    """A refused update, and a check that stops the run, leave their batch in the ledger and an event."""
    step = run.step + 1
    try:
        yield
    except (NonFiniteError, CheckError) as error:
        if isinstance(error, NonFiniteError):  # a check has told its own
            run.tracker.event("non_finite", str(error), step=step)
        run.tracker.log_groups(step, groups, samples)
        raise


def stop_at_reward(run: Run, reward: float) -> None:
    """The step that reaches the reward to stop at is made the last one, unless the policy has not learned yet."""
    if run.stop_at_reward is not None and reward >= run.stop_at_reward and run.step > run.pretrain_steps:
        run.tracker.event("reward_reached", f"step {run.step} reached run.stop_at_reward={run.stop_at_reward:g}")
        run.num_steps, run.reward_reached = run.step, True


async def follow_reference(run: Run) -> None:
    if run.update_reference_every and run.step % run.update_reference_every == 0:
        await run.trainer.update_reference()
        run.tracker.event("reference_updated", f"the policy after step {run.step} is the reference from now on")


async def recorded(run: Run, groups: Sequence[Group], samples: Sequence[Sample]) -> None:
    """The ledger is written by a thread, to the end even if something ends the run meanwhile."""
    writing = asyncio.ensure_future(
        asyncio.to_thread(run.tracker.log_groups, run.step, groups, samples, run.fingerprint)
    )
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await writing
        raise


async def after_step(run: Run, groups: Sequence[Group], samples: Sequence[Sample], stats: Metrics) -> None:
    """Record and track the step, judge its trend, then write a checkpoint if it is its turn; that time counts in the next.

    While a thread writes the ledger, the groups of the next step are already sampled.
    """
    before = run.step - 1
    metrics = rollout_metrics(groups, before, run.max_staleness) + stats
    metrics += first_update_metrics(samples, before) + annotation_metrics(samples)
    with run.timer("checks"):
        metrics["rollout/repetition"] = repetition(groups)
    with run.timer("record"):
        await recorded(run, groups, samples)
    metrics += run.timer.drain()
    step_s = sum(m.value() for name, m in metrics.items() if name.startswith("perf/"))
    metrics["perf/step_s"] = Mean(step_s)
    metrics["perf/publish_bytes"] = Last(run.published_bytes)
    metrics["perf/tokens_per_s"] = Mean(metrics["rollout/num_tokens"].value() / step_s)
    for measured in run.meters:
        metrics += measured()
    values = metrics.values_by_name()
    run.tracker.log(run.step, values)
    with run.timer("checks"):
        run.checks.after_step(run, values)
    stop_at_reward(run, metrics["rollout/reward"].value())
    await follow_reference(run)
    with run.timer("checkpoint"):
        await run.checkpoints.after_step(run, values)
