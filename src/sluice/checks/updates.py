"""What must hold of what is trained: weights, log-probs, advantages, the scale of the loss. Each check says what is wrong, or ""."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sluice.algorithms import Algorithm
from sluice.checks.columns import Array, column, first, place, totals
from sluice.data.batch import Minibatch
from sluice.types import Sample

HIGHEST_LOGPROB = 1e-3
"""Rounding may lift a log-prob of 0 by a little."""
TOKEN_OVER_BATCH = 100.0
"""A single token may differ by as much more: one that was never sampled differs by nats."""
SAMPLE_OVER_BATCH = 5
"""A single sample may differ by this many times what all of them together may: it has fewer tokens to average over."""


def weights_match(engine: str | None, trainer: str | None) -> str:
    """Of two fingerprints, each the owner's word over the weights that it computes with."""
    if engine == trainer:
        return ""
    return f"the engine decodes with the weights {engine}, and the trainer has published {trainer}"


def finite(samples: Sequence[Sample]) -> str:
    """In all that was filled so far."""
    fields = ("loss_weights", "logprobs", "old_logprobs", "ref_logprobs", "values", "advantages", "returns")
    for sample in samples:
        if not np.isfinite(sample.reward):
            return f"sample {sample.name}: a reward of {sample.reward}"
    for field in fields:
        having = [
            s for s in samples if getattr(s, field) and not (field == "old_logprobs" and s.old_logprobs is s.logprobs)
        ]
        values = column(having, field)
        wrong = ~np.isfinite(values)
        if field.endswith("logprobs"):
            wrong |= values > HIGHEST_LOGPROB
        if (at := first(wrong)) is not None:
            return f"{place(having, at)}: {field} is {values[at]:g}"
    return ""


def advantages(spec: Algorithm, samples: Sequence[Sample]) -> str:
    """What the row promises: what compares a group sums to 0 in it, what is whitened has mean 0, and both follow the rewards.

    Of raw with KL in the reward, and of gae, only the latter two hold, the order not: their advantages differ by token.
    """
    values, own = column(samples, "advantages"), column(samples, "loss_weights") != 0
    if (at := first((values != 0) & ~own)) is not None:
        return f"{place(samples, at)}: an advantage of {values[at]:g} where there is no loss"
    if not own.any():
        return ""
    largest = max(1.0, *(abs(s.reward) for s in samples))
    if spec.normalise == "whiten" and abs(values[own].mean()) > 1e-6 * largest:
        return f"whitened advantages have a mean of {values[own].mean():g} over {own.sum()} tokens, not 0"
    if spec.needs_values or (spec.advantage == "raw" and spec.kl_in_reward):
        return ""
    names: dict[tuple[int, int], int] = {}
    attempt = np.array([names.setdefault((s.group, s.index), len(names)) for s in samples])
    rewards = dict(zip(attempt.tolist(), (s.reward for s in samples), strict=True))
    of_token = np.repeat(attempt, [len(s) for s in samples])[own]
    turn = column(samples, "turn_ids", int)[own] if spec.credit == "turn" else np.zeros_like(of_token)
    num_turns = turn.max(initial=0) + 1
    units, start, unit = np.unique(of_token * num_turns + turn, return_index=True, return_inverse=True)
    value, attempt, turn = values[own][start], units // num_turns, units % num_turns
    if (at := first(values[own] != value[unit])) is not None:
        return f"{place(samples, int(np.flatnonzero(own)[at]))}: its advantage is not that of the other tokens of its {spec.credit}"
    group = np.array([ticket for ticket, _ in names])[attempt]
    reward = np.array([rewards[number] for number in attempt.tolist()])
    if spec.compares_group and spec.normalise != "whiten" and (why := _sums(group, turn, value, reward)):
        return why
    if spec.advantage == "raw" and spec.normalise == "none" and spec.credit == "trajectory":
        at = first(value != reward)
        return "" if at is None else f"in group {group[at]} a reward of {reward[at]:g} has the advantage {value[at]:g}"
    ordered = spec.credit == "trajectory" and not spec.kl_in_reward
    return _order(group, value, reward) if ordered else ""


def _sums(group: Array, turn: Array, value: Array, reward: Array) -> str:
    """Of what was compared: the attempts of a group, or with credit: turn one turn of each."""
    _, start, compared = np.unique(group * (turn.max() + 1) + turn, return_index=True, return_inverse=True)
    total, size = np.bincount(compared, value), np.bincount(compared, np.abs(value))
    largest = max(1.0, float(np.abs(reward).max()))
    at = first(~(np.abs(total) <= 1e-6 * size + 1e-8 * largest))
    return "" if at is None else f"the advantages of group {group[start[at]]} sum to {total[at]:g}, not to 0"


def _order(group: Array, value: Array, reward: Array) -> str:
    """Of neighbours in a group, by reward: more is worth more, and the same the same."""
    order = np.lexsort((reward, group))
    more, worth = np.diff(reward[order]), np.diff(value[order])
    same_group = np.diff(group[order]) == 0
    gap = 1e-6 * np.maximum(1.0, np.abs(reward).max())
    slack = 1e-9 * np.maximum(1.0, np.abs(value).max())
    wrong = ((more > gap) & (worth <= 0)) | ((more == 0) & (np.abs(worth) > slack)) | (worth < -slack)
    if (at := first(wrong & same_group)) is None:
        return ""
    low, high = order[at], order[at + 1]
    return (
        f"in group {group[low]} a reward of {reward[high]:g} has the advantage {value[high]:g}, and one of {reward[low]:g} has "
        f"{value[low]:g}"
    )


def loss_scale(spec: Algorithm, samples: Sequence[Sample], minibatches: Sequence[Minibatch]) -> str:
    """Every sample is in one update, and its coefficients there add up to the share that the aggregation promises it."""
    times = Counter(id(s) for minibatch in minibatches for m in minibatch.micro_batches for s in m.samples)
    for sample in samples:
        if times[id(sample)] != 1:
            return f"sample {sample.name} is in {times[id(sample)]} micro-batches of the step"
    for minibatch in minibatches:
        own = [sample for micro_batch in minibatch.micro_batches for sample in micro_batch.samples]
        promised = _shares(spec, own)
        given = np.concatenate(
            [
                np.bincount(m.sequence_ids.numpy(), m.coefficients.double().numpy(), len(m.samples))
                for m in minibatch.micro_batches
            ]
        )
        if (at := first(~np.isclose(given, promised, rtol=1e-4, atol=1e-12))) is not None:
            return (
                f"sample {own[at].name} weighs {given[at]:g} in update {minibatch.index}, and aggregation {spec.aggregation} "
                f"promises it {promised[at]:g}"
            )
    return ""


def _shares(spec: Algorithm, samples: Sequence[Sample]) -> Array:
    """[samples] of one update: what each one's coefficients add up to; see `token_coefficients` for the formulas."""
    weights = totals(column(samples, "loss_weights"), samples)
    _, group = np.unique([sample.group for sample in samples], return_inverse=True)
    in_group = np.bincount(group, weights)
    num = max(1, int((weights != 0).sum()))
    per_token = weights / (weights.sum() or 1.0)
    per_sequence = (weights != 0) / num
    match spec.aggregation:
        case "token_mean":
            return per_token
        case "sequence_mean":
            return per_sequence
        case "prompt_mean":
            return weights / np.where(in_group == 0, 1.0, in_group)[group] / max(1, int((in_group != 0).sum()))
        case "constant":
            return weights / (num * (spec.loss_constant or 1.0))
        case "blend":
            share = spec.token_share or 0.0
            return share * per_token + (1 - share) * per_sequence


def first_update_ratio(samples: Sequence[Sample], version: int, tolerance: float) -> str:
    """Mean |trainer's - engine's log-prob| over all tokens, and over those of each sample, in nats.

    Of the step's first update, and of all samples where the trainer's log-probs before it are known. `version` is that of the
    trainer's weights; samples that others made are left out.
    """
    seen = {
        "at the first update": ("current_logprobs", [s for s in samples if s.update == 0 and s.current_logprobs]),
        "before it": ("old_logprobs", [s for s in samples if s.old_logprobs is not s.logprobs]),
    }
    for when, (field, having) in seen.items():
        fresh = [s for s in having if all(v in (-1, version) for v in s.policy_versions)]
        if fresh and (why := _difference(fresh, field, tolerance)):
            return f"engine and trainer have the same weights, and {when} {why}"
    return ""


def _difference(samples: Sequence[Sample], field: str, tolerance: float) -> str:
    own = column(samples, "policy_versions", int) >= 0
    difference = np.where(own, np.abs(column(samples, field) - column(samples, "logprobs")), 0.0)
    means = totals(difference, samples) / np.maximum(1.0, totals(own, samples))
    whole, worst = difference.sum() / own.sum(), int(means.argmax())
    if whole <= tolerance and means[worst] <= SAMPLE_OVER_BATCH * tolerance:
        at, most = int(difference.argmax()), TOKEN_OVER_BATCH * tolerance
        if difference[at] <= most:
            return ""
        return f"their log-probs of {place(samples, at)} differ by {difference[at]:.3g} nats (at most {most:g})"
    return (
        f"their log-probs differ by {whole:.3g} nats in the mean over {len(samples)} samples (at most {tolerance:g}), and by "
        f"{means[worst]:.3g} over the tokens of sample {samples[worst].name} (at most {SAMPLE_OVER_BATCH * tolerance:g})"
    )


def padded_packed(samples: Sequence[Sample], answers: dict[str, list[list[float]]], tolerance: float) -> str:
    """`answers` are the trainer's log-probs of the same samples, by how they were put before it; the first one is right."""
    (how, right), *others = answers.items()
    for other, given in others:
        for sample, expected, found in zip(samples, right, given, strict=True):
            own = np.array(sample.loss_weights) != 0
            difference = float(np.abs(np.array(expected) - np.array(found))[own].mean()) if own.any() else 0.0
            if not difference <= SAMPLE_OVER_BATCH * tolerance:
                return (
                    f"the trainer's log-probs of sample {sample.name} differ by {difference:.3g} nats in the mean (at most "
                    f"{SAMPLE_OVER_BATCH * tolerance:g}) between {how} and {other}"
                )
    return ""
