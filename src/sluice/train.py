"""The loop."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from sluice.data.samples import to_samples
from sluice.errors import NonFiniteError, RolloutError
from sluice.rollout.metrics import annotation_metrics, first_update_metrics, rollout_metrics
from sluice.rollout.worker import rollout_workers
from sluice.run import Run
from sluice.tracking.metrics import Mean, Metrics
from sluice.types import Group, Sample
from sluice.update import prepare, update


async def train(run: Run) -> None:
    """Sample groups, turn rewards into advantages, step the policy, publish its weights.

    Sync, async and distributed runs differ in what `run` was built from, never in this function.
    """
    await run.engine.update_weights(run.trainer.weights(), run.step)
    async with rollout_workers(run):  # a worker that raises ends the run
        while run.step < run.num_steps:
            with run.timer("rollout"), rejected_on_record(run):
                groups = await run.buffer.take(run.groups_per_step)  # oldest first
                check_staleness(run, groups)
            samples = to_samples(groups)
            with run.timer("train"), saved_on_failure(run, groups, samples):
                minibatches = await prepare(run, samples)  # log-probs, advantages, packing
                stats = await update(run, minibatches)
            run.step += 1
            with run.timer("publish"):
                await run.engine.update_weights(run.trainer.weights(), run.step)
            await run.buffer.release(len(groups))  # only now may new groups start: none is born stale
            await after_step(run, groups, samples, stats)


def check_staleness(run: Run, groups: Sequence[Group]) -> None:
    """The buffer bounds staleness by its structure; this says so if it ever does not."""
    for group in groups:
        staleness = run.step - group.oldest_version
        if staleness > run.max_staleness:
            raise RolloutError(
                f"group {group.id} (prompt {group.prompt.id}) was sampled {staleness} updates ago, and "
                f"rollout.max_staleness is {run.max_staleness}; this is a bug in the buffer"
            )


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
    """A refused update leaves its batch in the ledger and an event before it ends the run."""
    try:
        yield
    except NonFiniteError as error:
        run.tracker.event("non_finite", str(error), step=run.step + 1)
        run.tracker.log_groups(run.step + 1, groups, samples)
        raise


def stop_at_reward(run: Run, reward: float) -> None:
    """The step that reaches the reward to stop at is made the last one, unless the policy has not learned yet."""
    if run.stop_at_reward is not None and reward >= run.stop_at_reward and run.step > run.pretrain_steps:
        run.tracker.event("reward_reached", f"step {run.step} reached run.stop_at_reward={run.stop_at_reward:g}")
        run.num_steps = run.step


async def follow_reference(run: Run) -> None:
    if run.update_reference_every and run.step % run.update_reference_every == 0:
        await run.trainer.update_reference()
        run.tracker.event("reference_updated", f"the policy after step {run.step} is the reference from now on")


async def after_step(run: Run, groups: Sequence[Group], samples: Sequence[Sample], stats: Metrics) -> None:
    """Record and track the step, then write a checkpoint if it is its turn; that time counts in the next step."""
    everything = [*groups, *run.buffer.drain_rejected()]
    metrics = (
        rollout_metrics(everything, run.step - 1) + stats + first_update_metrics(samples) + annotation_metrics(samples)
    )
    with run.timer("record"):
        run.tracker.log_groups(run.step, everything, samples)
    metrics += run.timer.drain()
    step_s = sum(m.value() for name, m in metrics.items() if name.startswith("perf/"))
    metrics["perf/step_s"] = Mean(step_s)
    metrics["perf/tokens_per_s"] = Mean(metrics["rollout/num_tokens"].value() / step_s)
    run.tracker.log(run.step, metrics.values_by_name())
    stop_at_reward(run, metrics["rollout/reward"].value())
    await follow_reference(run)
    if run.step == run.num_steps or (run.checkpoint_every and run.step % run.checkpoint_every == 0):
        with run.timer("checkpoint"):
            await run.checkpoints.save(run, metrics.values_by_name())
