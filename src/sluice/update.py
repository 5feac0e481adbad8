"""From the samples of a step to an updated policy: what the loop does, and what a replay does again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

from torch import Tensor

from sluice.algorithms import Algorithm, LossOutput, assign_advantages, policy_loss
from sluice.data.batch import MicroBatch, Minibatch, Packing, pack
from sluice.interfaces import Trainer
from sluice.tracking.metrics import Metrics
from sluice.types import Sample


class Learner(Protocol):
    """What an update needs of a run."""

    trainer: Trainer
    algorithm: Any  # Algorithm, and Packing below: a Run, which is on a lower level, does not know them
    packing: Any
    old_logprobs: Literal["engine", "recomputed"]
    pretrain_steps: int
    step: int


async def prepare(learner: Learner, samples: Sequence[Sample]) -> list[Minibatch]:
    """Fill what advantages and loss need, assign the advantages, and cut the samples into updates."""
    algorithm: Algorithm = learner.algorithm
    packing: Packing = learner.packing
    if learner.old_logprobs == "recomputed":
        await learner.trainer.forward(samples, "old_logprobs")
    else:
        for sample in samples:
            sample.old_logprobs = sample.logprobs
    if algorithm.needs_reference:
        await learner.trainer.forward(samples, "ref_logprobs")
    if algorithm.needs_values:
        await learner.trainer.forward(samples, "values")
    assign_advantages(algorithm, samples)
    return pack(samples, packing, algorithm)


async def update(
    learner: Learner, minibatches: Iterable[Minibatch], look: Callable[[Minibatch], None] | None = None
) -> Metrics:
    """The updates of a step, one after the other; their metrics together. `look` is called before each moves the weights."""
    loss = partial(loss_of, learner.algorithm, learner.old_logprobs) if learner.step >= learner.pretrain_steps else None
    stats = Metrics()
    for minibatch in minibatches:
        stats += await learner.trainer.forward_backward(minibatch, loss)
        if look:
            look(minibatch)
        stats += await learner.trainer.optim_step()
        await asyncio.sleep(0)  # lets Ctrl-C and failing workers in
    return stats


def loss_of(
    algorithm: Algorithm,
    old_logprobs: Literal["engine", "recomputed"],
    logprobs: Tensor,
    entropies: Tensor,
    batch: MicroBatch,
) -> LossOutput:
    """The loss of one micro-batch. Bound to its first two arguments it can be sent to another process."""
    return policy_loss(
        algorithm,
        logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.loss_weights,
        batch.sequence_ids,
        coefficients=batch.coefficients,
        engine_logprobs=batch.logprobs if old_logprobs == "recomputed" else None,
        ref_logprobs=batch.ref_logprobs,
        entropies=entropies,
    )
