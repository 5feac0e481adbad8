"""Random ragged batches: padded to [N, L] as the peers take them, packed to [T] as sluice does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sluice.algorithms import Algorithm, policy_loss, resolve, token_coefficients
from sluice.types import Sample

SEEDS = range(16)
MAX_TOKENS = 48
"""What dr_grpo divides by."""


def row(name: str, **words: Any) -> Algorithm:
    return resolve(name, words, max_new_tokens=MAX_TOKENS, group_size=4)


@dataclass
class Ragged:
    """Sequences of 1 to 9 tokens behind which padding stands; floats are [N, L] but for the rewards [N]."""

    logprobs: Tensor
    old_logprobs: Tensor
    engine_logprobs: Tensor
    ref_logprobs: Tensor
    entropies: Tensor
    values: Tensor
    old_values: Tensor
    returns: Tensor
    advantages: Tensor
    mask: Tensor  # 1.0 where the policy wrote, 0.0 for the environment's tokens and padding
    rewards: Tensor
    present: Tensor  # [N, L] bool: not padding
    groups: Tensor  # [N]

    @property
    def own(self) -> Tensor:
        return self.mask != 0

    @property
    def sequence_ids(self) -> Tensor:
        return torch.arange(len(self.mask))[:, None].expand_as(self.mask)[self.present]

    @property
    def lengths(self) -> Tensor:
        """[N] tokens of the policy."""
        return self.mask.sum(-1)

    def packed(self, padded: Tensor) -> Tensor:
        return padded[self.present]

    def padded(self, packed: Tensor) -> Tensor:
        result = torch.zeros_like(self.mask, dtype=packed.dtype)
        result[self.present] = packed
        return result

    def samples(self) -> list[Sample]:
        """Each behind one token of prompt, with the reward and all that advantages are made of."""
        result = []
        for i, present in enumerate(self.present):
            weights, old, ref, values = (
                [0.0, *column[i][present].tolist()]
                for column in (self.mask, self.old_logprobs, self.ref_logprobs, self.old_values)
            )
            length = len(weights)
            sample = Sample(
                [0] * length, weights, old, [0] * length, 1.0, int(self.groups[i]), i, float(self.rewards[i])
            )
            sample.old_logprobs, sample.ref_logprobs, sample.values = old, ref, values
            result.append(sample)
        return result

    def from_samples(self, samples: list[Sample], field: str) -> Tensor:
        packed = [number for sample in samples for number in getattr(sample, field)[1:]]
        return self.padded(torch.tensor(packed, dtype=torch.float64))


def ragged(
    seed: int,
    dtype: torch.dtype = torch.float64,
    *,
    sizes: tuple[int, ...] = (4, 4, 4),
    holes: bool = True,
    shared: bool = False,
) -> Ragged:
    """Groups of `sizes`; the policy has left some sequences where they were, and others by factors of up to e⁴.

    With `holes` the environment's tokens stand between the policy's. Each token has an advantage of its own, or with
    `shared` that of its sequence. All numbers are exact in float32.
    """
    rng = np.random.default_rng(seed)
    num, longest = sum(sizes), 9
    lengths = np.append(rng.integers(1, longest + 1, num - 1), longest)  # padded no further than to the longest
    present = torch.tensor(np.arange(longest) < lengths[:, None])
    written = rng.random((num, longest)) < (0.7 if holes else 1.0)
    written[:, 0] = True
    mask = present & torch.tensor(written)
    spread = rng.choice([0.0, 0.05, 0.5, 1.0, 4.0], (num, 1))

    def moved(base: np.ndarray, by: Any) -> np.ndarray:
        return base + by * rng.uniform(-1, 1, base.shape)

    logprobs = -rng.exponential(1.0, (num, longest))
    old = moved(logprobs, spread)
    values = rng.normal(size=(num, longest))
    advantages = np.broadcast_to(rng.normal(size=(num, 1 if shared else longest)), (num, longest))
    floats = {
        "logprobs": logprobs,
        "old_logprobs": old,
        "engine_logprobs": moved(old, rng.choice([0.01, 0.3, 1.0], (num, 1))),
        "ref_logprobs": moved(logprobs, 0.7),
        "entropies": rng.exponential(1.0, (num, longest)),
        "values": values,
        "old_values": moved(values, 0.5),
        "returns": moved(values, 1.0),
        "advantages": advantages,
    }
    padded = {k: _exact(np.where(present, v, 0.0)).to(dtype) for k, v in floats.items()}
    rewards = _exact(rng.choice([0.0, 1.0, 0.25, -0.7, 3.0], num)).to(dtype)
    return Ragged(
        **padded,
        mask=mask.to(dtype),
        rewards=rewards,
        present=present,
        groups=torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)),
    )


def _exact(numbers: np.ndarray) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32).double()


@dataclass
class Measured:
    """What a loss function makes of a batch."""

    loss: Tensor
    gradient: Tensor  # [N, L] to the log-probs
    terms: Tensor | None = None  # [N, L] the share of each token in the policy-gradient part of the loss


def sluice_loss(spec: Algorithm, batch: Ragged, scale: Tensor | None = None) -> Measured:
    """Of one whole update; `scale` [N] multiplies what sluice divides each sequence by."""
    group_ids = batch.groups[:, None].expand_as(batch.mask)
    weights, ids, groups = batch.packed(batch.mask), batch.sequence_ids, batch.packed(group_ids)
    coefficients = token_coefficients(spec, weights, ids, groups)
    if scale is not None:
        coefficients = coefficients * scale.to(coefficients.dtype)[ids]
    logprobs = batch.logprobs.clone().requires_grad_()
    output = policy_loss(
        spec,
        *(batch.packed(x) for x in (logprobs, batch.old_logprobs, batch.advantages)),
        weights,
        ids,
        coefficients=coefficients,
        engine_logprobs=batch.packed(batch.engine_logprobs),
        ref_logprobs=batch.packed(batch.ref_logprobs),
        entropies=batch.packed(batch.entropies),
    )
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    return Measured(output.loss.detach(), gradient, batch.padded((coefficients * output.per_token).detach()))
