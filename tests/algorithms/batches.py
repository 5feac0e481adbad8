"""Random ragged batches for the loss tests: as tensors for sluice, and as responses for the oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from oracle import Response
from torch import Tensor

from sluice.algorithms import Algorithm, LossOutput, policy_loss
from sluice.algorithms.aggregation import Totals

REWARDS = (0.0, 1.0, 0.1, -0.7, 3.0)
JUNK = (-np.inf, np.inf, np.nan, 0.0, -3.0)

modest = settings(max_examples=20, deadline=None, derandomize=True)


@dataclass
class Batch:
    """Tokens of sequences that lie one behind the other; [T] but for the two [N]."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    loss_weights: Tensor
    sequence_ids: Tensor
    rewards: Tensor  # [N]
    groups: Tensor  # [N]

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

    def responses(self, advantages: list[float]) -> tuple[list[Response], list[Tensor]]:
        """For the oracle: what the policy wrote, one response per sequence that has any; and a leaf for every token."""
        leaves = [value.clone().requires_grad_() for value in self.logprobs.double().unbind()]
        responses = []
        for i, advantage in enumerate(advantages):
            own = [t for t in self.sequence(i).tolist() if self.loss_weights[t] != 0]
            if own:
                old = [float(self.old_logprobs[t]) for t in own]
                responses.append(Response([leaves[t] for t in own], old, advantage))
        return responses, leaves


COLUMNS = ("logprobs", "old_logprobs", "advantages", "loss_weights", "sequence_ids")


@st.composite
def batches(draw: Any, weights: tuple[float, ...] = (1.0,), longest: int = 6) -> Batch:
    """Lengths from 1, groups from one member, masked tokens with any junk in them, ratios up to 1e8 and down to 1e-8.

    All numbers are exact in float32. Advantages are random and one per sequence; the rewards are not theirs.
    """
    masks = st.sampled_from(["none", "none", "some", "all"])
    spreads = st.sampled_from([0.0, 2e-4, 0.3, 2.0, 18.0])
    sequences = draw(
        st.lists(st.tuples(st.integers(1, longest), masks, spreads, st.integers(0, 3)), min_size=1, max_size=8)
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    parts = [_sequence(rng, length, mask, spread, weights) for length, mask, spread, _ in sequences]
    columns = [torch.tensor(np.concatenate(c), dtype=torch.float32).double() for c in zip(*parts, strict=True)]
    return Batch(
        *columns,
        sequence_ids=torch.repeat_interleave(
            torch.arange(len(sequences)), torch.tensor([length for length, *_ in sequences])
        ),
        rewards=torch.tensor(rng.choice(REWARDS, len(sequences)), dtype=torch.float32).double(),
        groups=torch.tensor([7 * group + 2 for *_, group in sequences]),
    )


def _sequence(rng: Any, length: int, mask: str, spread: float, weights: tuple[float, ...]) -> list[Any]:
    own = {"none": np.ones(length, bool), "some": rng.random(length) < 0.6, "all": np.zeros(length, bool)}[mask]
    logprobs = -rng.exponential(2.0, length)
    columns = [logprobs, logprobs - spread * rng.uniform(-1, 1, length), np.full(length, rng.normal())]
    junk = [rng.choice(JUNK, length) for _ in columns]
    columns = [np.where(own, values, other) for values, other in zip(columns, junk, strict=True)]
    return [*columns, np.where(own, rng.choice(weights, length), 0.0)]


def loss_of(spec: Algorithm, batch: Batch, totals: Totals | None = None) -> tuple[LossOutput, Tensor]:
    """What sluice makes of a batch, and the gradient that every token's log-prob gets."""
    logprobs = batch.logprobs.clone().requires_grad_()
    output = policy_loss(spec, logprobs, *(getattr(batch, k) for k in COLUMNS[1:]), totals)
    output.loss.backward()
    assert logprobs.grad is not None
    return replace(output, loss=output.loss.detach(), per_token=output.per_token.detach()), logprobs.grad
