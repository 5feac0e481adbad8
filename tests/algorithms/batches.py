"""Random ragged batches for the loss tests: as tensors for sluice, and as responses for the oracle."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from oracle import Response
from torch import Tensor

from sluice.algorithms import Algorithm, LossOutput, policy_loss, resolve

REWARDS = (0.0, 1.0, 0.1, -0.7, 3.0)
JUNK = (-np.inf, np.inf, np.nan, 0.0, -3.0)
WEIGHTS = (1.0, 0.25, 3.0)

SMALLEST = () if os.environ.get("NO_SHRINKING") else (Phase.shrink,)
"""Whoever only wants to know whether a test fails need not wait for its smallest example."""
modest = settings(max_examples=20, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate, *SMALLEST))


def row(name: str, **words: Any) -> Algorithm:
    return resolve(name, words, max_new_tokens=48, group_size=4)


@dataclass
class Batch:
    """Tokens of sequences that lie one behind the other; [T] but for the two [N]."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    engine_logprobs: Tensor
    ref_logprobs: Tensor
    entropies: Tensor
    loss_weights: Tensor
    sequence_ids: Tensor
    rewards: Tensor  # [N]
    groups: Tensor  # [N]
    group_ids: Tensor | None = None

    def __post_init__(self) -> None:
        if self.group_ids is None:
            self.group_ids = self.groups[self.sequence_ids]

    @property
    def own(self) -> Tensor:
        return self.loss_weights != 0

    def to(self, dtype: torch.dtype) -> Batch:
        return Batch(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in vars(self).items()})

    def select(self, tokens: Tensor) -> Batch:
        """Some tokens, in some order, with the sequences numbered anew as they come."""
        columns = {k: getattr(self, k)[tokens] for k in COLUMNS}
        seen = list(dict.fromkeys(columns["sequence_ids"].tolist()))
        columns["sequence_ids"] = torch.tensor([seen.index(i) for i in columns["sequence_ids"].tolist()], dtype=int)
        return replace(self, **columns)

    def sequence(self, *ids: int) -> Tensor:
        """Where the tokens of these sequences are."""
        return torch.cat([torch.nonzero(self.sequence_ids == i)[:, 0] for i in ids])

    def responses(self) -> tuple[list[Response], list[Tensor], list[Tensor]]:
        """For the oracle: what the policy wrote, one response per sequence that has any.

        And the leaves of all tokens, of log-prob and of entropy.
        """
        leaves, entropies = (
            [value.clone().requires_grad_() for value in column.double().unbind()]
            for column in (self.logprobs, self.entropies)
        )
        responses = []
        for i in range(len(self.rewards)):
            own = [t for t in self.sequence(i).tolist() if self.loss_weights[t] != 0]
            if own:
                floats = {k: [float(getattr(self, k)[t]) for t in own] for k in FLOATS}
                responses.append(
                    Response(
                        logprobs=[leaves[t] for t in own],
                        weights=[float(self.loss_weights[t]) for t in own],
                        group=int(self.group_ids[own[0]]),
                        entropies=[entropies[t] for t in own],
                        **floats,
                    )
                )
        return responses, leaves, entropies


FLOATS = ("old_logprobs", "advantages", "engine_logprobs", "ref_logprobs")
MASKABLE = ("logprobs", *FLOATS, "entropies")
COLUMNS = (*MASKABLE, "loss_weights", "sequence_ids", "group_ids")


@st.composite
def batches(draw: Any, weights: tuple[float, ...] = (1.0,), longest: int = 6, same: bool = False) -> Batch:
    """Lengths from 1, groups from one member, masked tokens with any junk in them, ratios up to 1e8 and down to 1e-8.

    All numbers are exact in float32. Advantages are random; in some sequences each token has its own, but with `same` in none.
    The rewards are not theirs.
    """
    masks = st.sampled_from(["none", "none", "some", "all"])
    spreads = st.sampled_from([0.0, 2e-4, 0.3, 2.0, 18.0])
    each = st.sampled_from([False, False, not same])
    sequences = draw(
        st.lists(st.tuples(st.integers(1, longest), masks, spreads, each, st.integers(0, 3)), min_size=1, max_size=8)
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    parts = [_sequence(rng, *sequence[:4], weights) for sequence in sequences]
    columns = [torch.tensor(np.concatenate(c), dtype=torch.float32).double() for c in zip(*parts, strict=True)]
    return Batch(
        *columns,
        sequence_ids=torch.repeat_interleave(
            torch.arange(len(sequences)), torch.tensor([length for length, *_ in sequences])
        ),
        rewards=torch.tensor(rng.choice(REWARDS, len(sequences)), dtype=torch.float32).double(),
        groups=torch.tensor([7 * group + 2 for *_, group in sequences]),
    )


def _sequence(
    rng: Any, length: int, mask: str, spread: float, each: bool, weights: tuple[float, ...]
) -> list[np.ndarray]:
    own = {"none": np.ones(length, bool), "some": rng.random(length) < 0.6, "all": np.zeros(length, bool)}[mask]
    logprobs = -rng.exponential(2.0, length)
    old = logprobs - spread * rng.uniform(-1, 1, length)
    columns = [
        logprobs,
        old,
        rng.normal(size=length) if each else np.full(length, rng.normal()),
        old - rng.choice([0.0, 0.02, 0.5, 3.0]) * rng.uniform(-1, 1, length),
        logprobs - rng.choice([0.0, 0.3, 2.0]) * rng.uniform(-1, 1, length),
        rng.exponential(1.0, length),
    ]
    columns = [np.where(own, values, rng.choice(JUNK, length)) for values in columns]
    return [*columns, np.where(own, rng.choice(weights, length), 0.0)]


def ragged(sequences: list[tuple[int, float]], log_ratio: float, weights: list[float] | None = None) -> Batch:
    """(length, advantage) each; all log-probs -1."""
    lengths = torch.tensor([length for length, _ in sequences])
    total = int(lengths.sum())
    return Batch(
        logprobs=torch.full((total,), -1.0, dtype=torch.float64),
        old_logprobs=torch.full((total,), -1.0 - log_ratio, dtype=torch.float64),
        advantages=torch.repeat_interleave(torch.tensor([a for _, a in sequences], dtype=torch.float64), lengths),
        engine_logprobs=torch.full((total,), -1.0 - log_ratio, dtype=torch.float64),
        ref_logprobs=torch.full((total,), -1.0, dtype=torch.float64),
        entropies=torch.ones(total, dtype=torch.float64),
        loss_weights=torch.tensor(weights or [1.0] * total, dtype=torch.float64),
        sequence_ids=torch.repeat_interleave(torch.arange(len(sequences)), lengths),
        rewards=torch.zeros(len(sequences), dtype=torch.float64),
        groups=torch.zeros(len(sequences), dtype=torch.int64),
    )


def arguments(spec: Algorithm, batch: Batch) -> dict[str, Tensor]:
    """What this row needs beyond what every row needs."""
    needed = {
        "group_ids": spec.aggregation == "prompt_mean",
        "engine_logprobs": spec.correction != "none" or spec.rejection != "none",
        "ref_logprobs": spec.kl == "loss",
        "entropies": bool(spec.entropy_coef),
    }
    return {name: getattr(batch, name) for name, needs in needed.items() if needs}


def loss_of(spec: Algorithm, batch: Batch, coefficients: Tensor | None = None) -> tuple[LossOutput, Tensor]:
    """What sluice makes of a batch, and the gradient that every token's log-prob gets."""
    output, gradient, _ = loss_and_gradients(spec, batch, coefficients)
    return output, gradient


def loss_and_gradients(
    spec: Algorithm, batch: Batch, coefficients: Tensor | None = None, loss: Callable[..., LossOutput] = policy_loss
) -> tuple[LossOutput, Tensor, Tensor]:
    """The same, and the gradient that every token's entropy gets. `loss` may be another than sluice's."""
    logprobs, entropies = (column.clone().requires_grad_() for column in (batch.logprobs, batch.entropies))
    output = loss(
        spec,
        logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.loss_weights,
        batch.sequence_ids,
        coefficients=coefficients,
        **arguments(spec, replace(batch, entropies=entropies)),
    )
    output.loss.backward()
    assert logprobs.grad is not None
    of_entropies = torch.zeros_like(batch.entropies) if entropies.grad is None else entropies.grad
    output = replace(output, loss=output.loss.detach(), per_token=output.per_token.detach())
    return output, logprobs.grad, of_entropies


Reduce = Callable[[Tensor], Tensor]


def in_ranks(size: int, work: Callable[[int, Reduce], Any]) -> list[Any]:
    """`work(rank, reduce)` in a thread per rank, where `reduce` waits for all and gives each the sum, as an all-reduce does."""
    barrier, slots, results = threading.Barrier(size, timeout=30), [torch.zeros(0)] * size, [None] * size

    def rank(i: int) -> None:
        def reduce(tensor: Tensor) -> Tensor:
            slots[i] = tensor.clone()
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        try:
            results[i] = work(i, reduce)
        except BaseException as error:
            results[i] = error
            barrier.abort()

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [r for r in results if isinstance(r, BaseException)]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return results
