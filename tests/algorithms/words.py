"""What every word of an algorithm does: a fingerprint of loss, gradients, advantages and rejection, which a word must change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import torch
from batches import Batch, loss_and_gradients, row

import sluice.algorithms
from sluice.algorithms import Algorithm, why_rejected
from sluice.errors import ConfigError
from sluice.types import Group, Prompt, Sample, Trajectory

# Another value than any row has; words whose values are words take all of theirs.
OTHER: dict[str, float] = {
    "std_eps": 0.5,
    "std_ddof": 0,
    "gamma": 0.5,
    "gae_lambda": 0.5,
    "clip_low": 0.05,
    "clip_high": 0.8,
    "dual_clip": 1.3,
    "ratio_min": 0.9,
    "ratio_max": 1.1,
    "gate_positive": 3.0,
    "gate_negative": 4.0,
    "tv_low": 0.01,
    "tv_high": 0.02,
    "loss_constant": 7.0,
    "token_share": 0.9,
    "kl_coef": 0.3,
    "entropy_coef": 0.2,
    "correction_min": 0.9,
    "correction_max": 1.1,
    "rejection_min": 0.9,
    "rejection_max": 1.1,
}
# What most rows leave off. A word of one of these does nothing until it is on.
PARTS: tuple[dict[str, Any], ...] = (
    {},
    {"correction": "icepop"},
    {"correction": "mis"},
    {"rejection": "sequence"},
    {"kl_coef": 0.1},
    {"aggregation": "blend"},
    {"normalise": "batch_std"},
    {"credit": "turn"},
)


def alternatives() -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(Algorithm)
    for word in (field.name for field in fields(Algorithm)):
        if word in OTHER:
            yield word, OTHER[word]
        elif word == "dynamic_sampling":
            yield from ((word, True), (word, False))
        elif word != "name":
            parts = [part for part in get_args(hints[word]) if part is not type(None)]
            yield from ((word, value) for part in parts for value in get_args(part) or (part,))


def effect(spec: Algorithm, implementation: Any = sluice.algorithms) -> tuple[list[float], ...]:
    """Everything that a spec decides, on one batch that has something for each word to act on."""
    output, *gradients = loss_and_gradients(spec, BATCH, loss=implementation.policy_loss)
    samples = make_samples(with_values=spec.advantage == "gae")
    implementation.assign_advantages(spec, samples)
    advantages = [a for s in samples for a in s.advantages]
    equal = Group(0, Prompt("p", []), [Trajectory([], outcome="scored", reward=1.0)] * 2)
    tensors = (output.loss[None], output.per_token, *gradients)
    return (*(t.tolist() for t in tensors), advantages, [float(bool(why_rejected(spec, equal)))])


def idle_words(name: str, implementation: Any = sluice.algorithms) -> tuple[list[str], set[str]]:
    """Settings of this row that are accepted and change nothing; and the words of which at least one acts."""
    idle, acting = [], set()
    for part in PARTS:
        base = _resolved(name, part)
        if base is None:
            continue
        before = effect(base, implementation)
        for word, value in alternatives():
            if part and word not in part and _resolved(name, {word: value}):
                continue  # tried without this part already
            spec = _resolved(name, part | {word: value})
            if spec is None or spec == base:
                continue
            if _same(effect(spec, implementation), before):
                idle.append(f"{name} {part}: {word}={value}")
            else:
                acting.add(word)
    return idle, acting


def _resolved(name: str, words: dict[str, Any]) -> Algorithm | None:
    try:
        return row(name, **words)
    except ConfigError:
        return None


def _same(first: tuple[list[float], ...], second: tuple[list[float], ...]) -> bool:
    pairs = [pair for a, b in zip(first, second, strict=True) for pair in zip(a, b, strict=True)]
    return all(abs(a - b) <= 1e-12 * (1 + abs(a)) for a, b in pairs)


def make_batch() -> Batch:
    """Ratios and advantages on both sides of every bound, an engine and a reference that differ, uneven groups and lengths."""
    maker = torch.Generator().manual_seed(3)
    lengths = torch.tensor([6, 3, 5, 2, 4, 2])
    ids = torch.repeat_interleave(torch.arange(6), lengths)

    def noise(size: float, around: torch.Tensor) -> torch.Tensor:
        """Of `size` around a mean that is exact in each sequence."""
        column = size * torch.randn(len(ids), generator=maker, dtype=torch.float64)
        means = torch.zeros(6, dtype=torch.float64).index_add(0, ids, column) / lengths
        return column - means[ids] + around[ids]

    logprobs = -0.2 - 4 * torch.rand(len(ids), generator=maker, dtype=torch.float64)
    old = logprobs - noise(0.3, torch.tensor([0.0, 0.05, -0.5, 0.5, -0.1, 3.2]))
    products = torch.tensor([1.05, 1.3, 0.7, 3.0, 0.2, 0.95]).log() / lengths
    return Batch(
        logprobs=logprobs,
        old_logprobs=old,
        advantages=noise(0.5, torch.zeros(6)) + torch.where(torch.arange(len(ids)) % 2 == 0, -1.0, 1.0),
        engine_logprobs=old - noise(0.8, products),
        ref_logprobs=logprobs - noise(0.5, torch.zeros(6)),
        entropies=noise(0.5, torch.ones(6)),
        loss_weights=torch.ones(len(ids), dtype=torch.float64),
        sequence_ids=ids,
        rewards=torch.zeros(6, dtype=torch.float64),
        groups=torch.tensor([4, 4, 4, 9, 9, 2]),
    )


BATCH = make_batch()


def make_samples(with_values: bool) -> list[Sample]:
    """Of uneven groups, with several turns and several tokens per turn."""
    maker = torch.Generator().manual_seed(5)
    samples = []
    for i, (group, turns) in enumerate([(4, 2), (4, 3), (4, 1), (9, 2), (9, 2)]):
        ids = [-1] + [k for k in range(turns) for _ in range(2)]
        n = len(ids)
        old, ref, values = torch.rand(3, n, generator=maker, dtype=torch.float64).tolist()
        rewards = torch.rand(turns, generator=maker, dtype=torch.float64).tolist()
        samples.append(
            Sample(
                list(range(n)),
                [0.0] + [1.0] * (n - 1),
                old,
                [0] * n,
                1.0,
                group,
                i,
                sum(rewards),
                turn_ids=ids,
                turn_rewards=rewards,
                old_logprobs=old,
                ref_logprobs=ref,
                values=values if with_values else [],
            )
        )
    return samples
