"""verl's corrections for an engine whose log-probs differ from the trainer's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from verl.trainer.ppo.rollout_corr_helper import (
    compute_rollout_correction_weights,
    compute_rollout_rejection_mask,
)

from parity.compare import assert_equal, assert_same_loss
from parity.peers_verl import verl_loss
from parity.ragged import SEEDS, Ragged, ragged, row, sluice_loss
from sluice.algorithms import Algorithm
from sluice.algorithms.ratios import correction_weights

DTYPES = [torch.float64, torch.float32]


def factors(spec: Algorithm, batch: Ragged) -> Tensor:
    """[N, L]; 1 for the environment's tokens and padding, for which verl has 0."""
    columns = (batch.packed(x) for x in (batch.old_logprobs, batch.engine_logprobs, batch.mask))
    return batch.padded(correction_weights(spec, *columns, batch.sequence_ids)) * batch.mask


WEIGHTS: dict[str, tuple[dict[str, Any], str, Any]] = {
    "tis, token": ({"correction": "tis", "correction_max": 1.2}, "token", 1.2),
    "tis, sequence": ({"correction": "tis", "correction_level": "sequence", "correction_max": 2.0}, "sequence", 2.0),
    "icepop, token": ({"correction": "icepop", "correction_min": 0.8, "correction_max": 1.2}, "token", "0.8_1.2"),
    "icepop, sequence": (
        {"correction": "icepop", "correction_level": "sequence", "correction_min": 0.5, "correction_max": 2.0},
        "sequence",
        "0.5_2.0",
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_correction_weights_are_verls(name: str, dtype: torch.dtype):
    words, level, threshold = WEIGHTS[name]
    spec = row("glm", **words)
    bounded = False
    for seed in SEEDS:
        batch = ragged(seed, dtype)
        theirs, _ = compute_rollout_correction_weights(
            batch.old_logprobs - batch.engine_logprobs, batch.mask, level, threshold
        )
        ours = factors(spec, batch)
        assert_equal(f"verl rollout_is: {name}", ours, theirs)
        bounded |= bool(((ours == 0) & batch.own).any()) or bool((ours == spec.correction_max).any())
    assert bounded


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_corrected_loss_is_verls(name: str):
    words, level, threshold = WEIGHTS[name]
    spec = row("dapo", dual_clip=3.0, **words)
    for seed in SEEDS:
        batch = ragged(seed)
        log_ratio = batch.old_logprobs - batch.engine_logprobs
        weights, _ = compute_rollout_correction_weights(log_ratio, batch.mask, level, threshold)
        theirs = verl_loss("vanilla", batch, "token-mean", weights, clip_ratio_high=0.28)
        assert_same_loss(f"verl vanilla and rollout_is: {name}", sluice_loss(spec, batch), theirs)


REJECTIONS = {"sequence": "seq_sum_k1", "geometric": "seq_mean_k1"}


@pytest.mark.parametrize("level", REJECTIONS)
def test_rejected_sequences_are_those_of_verl_with_reciprocal_bounds(level: str):
    """verl bounds k1 = -log ρ by the logs of its thresholds: a ratio ρ of 1/upper to 1/lower is kept."""
    lower, upper = {"sequence": (0.25, 2.0), "geometric": (0.9, 1.05)}[level]
    spec = row("glm", rejection=level, rejection_min=1 / upper, rejection_max=1 / lower)
    verdicts = set()
    for seed in SEEDS:
        batch = ragged(seed)
        kept, _ = compute_rollout_rejection_mask(
            batch.old_logprobs - batch.engine_logprobs, batch.mask, REJECTIONS[level], f"{lower}_{upper}"
        )
        assert_equal(f"verl rollout_rs: {level}", factors(spec, batch), kept)
        verdicts |= set(kept[batch.own].tolist())
    assert verdicts == {0.0, 1.0}


def test_verl_leaves_rejected_tokens_out_of_the_divisor():
    """Its rejection changes the response mask: with n of the N tokens kept, its token mean is N/n times sluice's."""
    spec = row("glm", rejection="sequence", rejection_min=0.5, rejection_max=2.0)
    for seed in SEEDS:
        batch = ragged(seed)
        kept, _ = compute_rollout_rejection_mask(
            batch.old_logprobs - batch.engine_logprobs, batch.mask, "seq_sum_k1", 2.0
        )
        ours = sluice_loss(spec, batch, (batch.mask.sum() / kept.sum()).expand(len(batch.mask)))
        batch.mask = kept
        theirs = verl_loss("vanilla", batch, "token-mean", clip_ratio_c=1e30)
        theirs.gradient, theirs.terms = theirs.gradient * kept, None
        assert_same_loss("verl rollout_rs: token mean, times N/n", ours, theirs)
