"""Supervised fine-tuning with the same trainer: next-token loss on given responses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sluice.algorithms.losses import LossOutput
from sluice.algorithms.spec import Algorithm
from sluice.data.batch import MicroBatch, Packing, make_minibatch
from sluice.interfaces import Tracker
from sluice.tracking.metrics import Mean, Metrics
from sluice.trainers.local import LocalTrainer
from sluice.types import Sample

CROSS_ENTROPY = Algorithm("sft", advantage="raw", ratio="none", clip="none", aggregation="token_mean")
"""REINFORCE on given responses, each with advantage 1."""


def sft_loss(logprobs: Tensor, entropies: Tensor, batch: MicroBatch) -> LossOutput:
    """-Σ w_t log π_t / Σ w over the update: cross-entropy of the response tokens."""
    per_token = -logprobs
    unclipped = torch.zeros_like(logprobs, dtype=torch.bool)
    return LossOutput(
        (batch.coefficients * per_token).sum(), per_token, torch.ones_like(logprobs), unclipped, Metrics()
    )


def response_sample(index: int, where: str, prompt_ids: list[int], response_ids: list[int]) -> Sample:
    """Loss on the response only."""
    ids = prompt_ids + response_ids
    weights = [0.0] * len(prompt_ids) + [1.0] * len(response_ids)
    return Sample(ids, weights, [0.0] * len(ids), [-1] * len(ids), 1.0, index, 0, prompt_id=where)


def num_updates(num_samples: int, samples_per_update: int, num_epochs: int) -> int:
    return -(-num_samples // samples_per_update) * num_epochs


async def train_sft(
    trainer: LocalTrainer,
    samples: Sequence[Sample],
    tracker: Tracker,
    packing: Packing,
    *,
    samples_per_update: int,
    num_epochs: int,
    shuffle_seed: int | None,
    log_every: int,
) -> None:
    """Epochs over `samples`, each in an order of its own (or, without a seed, as they are); the last update of an epoch
    takes what is left."""
    update, stats, tokens, start = 0, Metrics(), 0.0, time.perf_counter()
    for epoch in range(num_epochs):
        order = np.arange(len(samples))
        if shuffle_seed is not None:
            order = np.random.default_rng([shuffle_seed, epoch]).permutation(order)
        for share in np.split(order, range(samples_per_update, len(order), samples_per_update)):
            minibatch = make_minibatch([samples[i] for i in share], packing, CROSS_ENTROPY, update)
            stats += await trainer.forward_backward(minibatch, sft_loss)
            stats += await trainer.optim_step()
            await asyncio.sleep(0)  # lets Ctrl-C in
            tokens += minibatch.num_loss_tokens
            update += 1
            if update % log_every == 0 or update == num_updates(len(samples), samples_per_update, num_epochs):
                seconds = time.perf_counter() - start
                stats += {"perf/step_s": Mean(seconds), "perf/tokens_per_s": Mean(tokens, seconds)}
                tracker.log(update, stats.values_by_name())
                stats, tokens, start = Metrics(), 0.0, time.perf_counter()
