"""What was sampled, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from sluice.algorithms.diagnostics import explained_variance
from sluice.tracking.metrics import Last, Max, Mean, Metrics, Sum
from sluice.types import Group, Sample


def rollout_metrics(groups: Sequence[Group], version: int, max_staleness: int) -> Metrics:
    """Over every group that was sampled, rejected ones too; `version` is that of the weights that were trained on them.

    Rewards are means over the scored trajectories only: an error is not a zero. A part that a scored one lacks is one, so that
    the parts, times their weights, add up to the reward.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    scored = [t for t in trajectories if t.outcome == "scored"]
    turns = [turn for t in trajectories for turn in t.turns]
    metrics = Metrics(
        {
            "rollout/reward": Mean.of(t.reward for t in scored if t.reward is not None),
            "rollout/response_len/mean": Mean.of(t.num_response_tokens for t in trajectories),
            "rollout/response_len/max": Max(max((t.num_response_tokens for t in trajectories), default=0)),
            "rollout/num_tokens": Sum(sum(t.num_response_tokens for t in trajectories)),
            "rollout/finish/length": Mean.of(turn.completion.finish_reason == "length" for turn in turns),
            "rollout/outcome/error": Sum(sum(t.outcome == "error" for t in trajectories)),
            "rollout/outcome/timeout": Sum(sum(t.outcome == "timeout" for t in trajectories)),
            "rollout/rejected_groups": Sum(sum(bool(group.rejected) for group in groups)),
            "rollout/equal_reward_groups": Mean.of(
                len({t.reward for t in group.scored}) == 1 for group in groups if group.scored
            ),
        }
    )
    ages = Counter(
        version - made
        for group in groups
        if not group.rejected
        for t in group.trajectories
        for turn in t.turns
        for made in turn.completion.policy_versions
    )
    metrics["rollout/staleness/max"] = Max(max(ages, default=0))
    if max_staleness:
        metrics["rollout/staleness/mean"] = Mean(sum(age * num for age, num in ages.items()), ages.total())
        for age in range(max_staleness + 1):
            metrics[f"rollout/staleness/share_{age}"] = Mean(ages[age], ages.total())
    for label in sorted({label for t in scored for label in t.reward_parts}):
        metrics[f"rollout/reward/{label}"] = Mean.of(t.reward_parts.get(label, 0.0) for t in scored)
    return metrics


def repetition(groups: Sequence[Group]) -> Mean:
    """Share of the 4-grams of completions that have been in the same completion before."""
    completions = [turn.completion.token_ids for group in groups for t in group.trajectories for turn in t.turns]
    lengths = [len(ids) for ids in completions]
    ids = np.fromiter(chain.from_iterable(completions), np.int64, sum(lengths))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    num = max(0, len(ids) - 3)
    grams = owner[:num].astype(np.uint64)
    for place in range(4):  # one number each, equal for equal ones of one completion and hardly ever for others
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + ids[place : place + num].astype(np.uint64)
    grams = grams[owner[:num] == owner[3:]]
    return Mean(len(grams) - len(np.unique(grams)), len(grams))


def first_update_metrics(samples: Sequence[Sample], version: int) -> Metrics:
    """Over the loss tokens of the step's first update, of samples that were made by the weights before it (`version`) alone:
    those engine and trainer see with the same weights.

    |trainer's - engine's log-prob| is rounding; ppo_kl and pg_clipfrac against the old log-probs are 0 up to that. The
    probabilities' correlation is what MiniMax-M1 (arXiv 2506.13585, section 3.2) found to be 0.9 without an FP32 head.
    """
    first = [s for s in samples if s.update == 0 and all(made in (-1, version) for made in s.policy_versions)]
    own = _flat(first, "loss_weights") != 0
    if not own.any():
        return Metrics()
    names = ("current_logprobs", "logprobs", "old_logprobs", "clipped")
    current, engine, old, clipped = (_flat(first, name)[own] for name in names)
    differences, probs, engine_probs = np.abs(current - engine), np.exp(current), np.exp(engine)
    count = len(current)
    metrics = Metrics(
        {
            "train/engine_logprob_diff/mean": Mean(float(differences.sum()), count),
            "train/engine_logprob_diff/max": Max(float(differences.max())),
            "train/engine_prob_diff/mean": Mean(float(np.abs(probs - engine_probs).sum()), count),
            "train/first_update/ppo_kl": Mean(float((old - current).sum()), count),
            "train/first_update/pg_clipfrac": Mean(float(clipped.sum()), count),
        }
    )
    if probs.std() and engine_probs.std():
        metrics["train/engine_prob_corr"] = Last(float(np.corrcoef(probs, engine_probs)[0, 1]))
    return metrics


def annotation_metrics(samples: Sequence[Sample]) -> Metrics:
    """How far the policy was from the reference before the step (k1), and how well the critic foresaw the returns."""
    metrics = Metrics()
    if any(s.ref_logprobs for s in samples):
        metrics["train/ref_kl"] = Mean.of(old - ref for old, ref in _pairs(samples, "old_logprobs", "ref_logprobs"))
    if any(s.values for s in samples):
        values, returns = torch.tensor(_pairs(samples, "values", "returns"), dtype=torch.float64).unbind(1)
        metrics["train/explained_variance"] = Last(explained_variance(values, returns))
    return metrics


def _pairs(samples: Sequence[Sample], *names: str) -> list[tuple[float, ...]]:
    """Two columns of the samples, at their loss tokens."""
    own = _flat(samples, "loss_weights") != 0
    return list(zip(*(_flat(samples, name)[own].tolist() for name in names), strict=True))


def _flat(samples: Sequence[Sample], name: str) -> NDArray[np.float64]:
    """A column of all samples' tokens, one after the other."""
    return np.array(list(chain.from_iterable(getattr(s, name) for s in samples)), np.float64)
