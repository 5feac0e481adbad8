"""From samples to the tensors of one step: updates, micro-batches, and the counts that the loss divides by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from sluice.algorithms.aggregation import token_coefficients
from sluice.algorithms.spec import Algorithm
from sluice.interfaces import Layout
from sluice.types import Sample


@dataclass(frozen=True)
class Packing:
    """How the samples of a step are cut."""

    updates_per_batch: int
    tokens_per_micro_batch: int
    """Budget of input tokens, padding included; a sample that is longer goes alone."""
    layout: Layout


@dataclass
class MicroBatch:
    """What one forward and backward sees. B × L are the input's shape, T counts the tokens that bear a loss."""

    samples: list[Sample]
    input_ids: Tensor  # [B, L]
    position_ids: Tensor  # [B, L]
    document_ids: Tensor | None
    """[B, L] which sample a position belongs to, in the packed layout; in rows, padding comes last and nobody sees it."""
    hidden_index: Tensor  # [T] into B · L: the position whose hidden state predicts the token
    target_ids: Tensor  # [T]
    sequence_ids: Tensor  # [T] index into samples
    loss_weights: Tensor  # [T]
    coefficients: Tensor  # [T] of the token's loss in the update's; like all below, empty where it is not known
    advantages: Tensor  # [T]
    logprobs: Tensor  # [T] the engine's
    old_logprobs: Tensor  # [T]
    ref_logprobs: Tensor  # [T]
    values: Tensor  # [T] the critic's before the first update
    returns: Tensor  # [T]
    temperatures: Tensor  # [T]
    kept_ids: Tensor
    """Ids that top-p and top-k left to draw each token from, token after token; empty where they never dropped one."""
    kept_counts: Tensor  # [T] how many of `kept_ids` are the token's, 0 where none was dropped; empty as they are

    def to(self, device: torch.device) -> MicroBatch:
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return MicroBatch(**{**vars(self), **moved})

    def record(self, update: int, logprobs: Tensor, ratios: Tensor, clipped: Tensor) -> None:
        """Write what an update saw ([T] each) into its samples, for the ledger."""
        columns = self.spread(logprobs, 0.0), self.spread(ratios, 1.0), self.spread(clipped, False)
        for sample, *seen in zip(self.samples, *columns, strict=True):
            sample.update = update
            sample.current_logprobs, sample.ratios, sample.clipped = seen

    def spread(self, values: Tensor, empty: float | bool) -> list[list]:
        """[T] values as one list per sample over all of its tokens, `empty` where there is no loss."""
        own = [_loss_positions(sample) for sample in self.samples]
        numbers = values.tolist()
        spread = []
        for sample, positions, (start, end) in zip(
            self.samples, own, pairwise([0, *accumulate(map(len, own))]), strict=True
        ):
            row = [empty] * len(sample)
            for t, value in zip(positions, numbers[start:end], strict=True):
                row[t] = value
            spread.append(row)
        return spread


@dataclass
class Minibatch:
    """One optimiser update."""

    micro_batches: list[MicroBatch]
    num_loss_tokens: int
    index: int
    """Which update of the step."""


def pack(samples: Sequence[Sample], packing: Packing, spec: Algorithm) -> list[Minibatch]:
    """Cut the samples of a step into updates, and each update into micro-batches under the token budget.

    Updates take the samples in order, in shares that differ by one at most; with fewer samples than updates, each
    sample is an update.
    """
    num_updates = min(packing.updates_per_batch, len(samples))
    return [
        make_minibatch(
            samples[i * len(samples) // num_updates : (i + 1) * len(samples) // num_updates], packing, spec, i
        )
        for i in range(num_updates)
    ]


def make_minibatch(samples: Sequence[Sample], packing: Packing, spec: Algorithm, index: int) -> Minibatch:
    """One update. Who divides by what is settled here, over all of it, whatever the cut into micro-batches."""
    micro_batches = [collate(part, packing.layout) for part in under_budget(samples, packing)]
    lengths = [len(micro_batch.loss_weights) for micro_batch in micro_batches]
    first_ids = accumulate((len(micro_batch.samples) for micro_batch in micro_batches), initial=0)
    sequence_ids = torch.cat([m.sequence_ids + first for m, first in zip(micro_batches, first_ids, strict=False)])
    groups = torch.tensor([sample.group for micro_batch in micro_batches for sample in micro_batch.samples])
    weights = torch.cat([micro_batch.loss_weights for micro_batch in micro_batches]).double()
    coefficients = token_coefficients(spec, weights, sequence_ids, groups[sequence_ids]).float()
    for micro_batch, share in zip(micro_batches, coefficients.split(lengths), strict=True):
        micro_batch.coefficients = share
    return Minibatch(micro_batches, len(weights), index)


def under_budget(samples: Sequence[Sample], packing: Packing) -> list[list[Sample]]:
    """Parts of at most the budget, longest sample first: one that does not fit the memory fails at once, not in hour 20.

    In rows, samples shorter than half the part's longest start a new part, so that padding stays below one half.
    """
    parts: list[list[Sample]] = []
    used = 0
    for sample in sorted(samples, key=len, reverse=True):
        width = len(parts[-1][0]) if parts and packing.layout == "rows" else len(sample)
        if not parts or used + width > packing.tokens_per_micro_batch or 2 * len(sample) < width:
            parts.append([])
            used, width = 0, len(sample)
        parts[-1].append(sample)
        used += width
    return parts


def collate(samples: Sequence[Sample], layout: Layout) -> MicroBatch:
    """The tensors of some samples."""
    samples = list(samples)
    lengths = [len(sample) for sample in samples]
    if layout == "rows":
        width = max(lengths)
        starts = [row * width for row in range(len(samples))]
        input_ids = torch.tensor([sample.token_ids + [0] * (width - len(sample)) for sample in samples])
        position_ids = torch.arange(width).expand(len(samples), width)
        document_ids = None
    else:
        starts = [0, *accumulate(lengths)][:-1]
        input_ids = torch.tensor([[token for sample in samples for token in sample.token_ids]])
        position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
        document_ids = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(lengths))[None]
    own = [_loss_positions(sample) for sample in samples]
    kept = _kept_ids(samples)

    def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """[T], or empty where the samples do not have it (yet)."""
        values = [(getattr(sample, name), positions) for sample, positions in zip(samples, own, strict=True)]
        return torch.tensor([row[t] for row, positions in values if row for t in positions], dtype=dtype)

    return MicroBatch(
        samples=samples,
        input_ids=input_ids,
        position_ids=position_ids,
        document_ids=document_ids,
        hidden_index=torch.tensor(
            [start + t - 1 for start, positions in zip(starts, own, strict=True) for t in positions], dtype=torch.int64
        ),
        target_ids=column("token_ids", torch.int64),
        sequence_ids=torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([len(p) for p in own])),
        loss_weights=column("loss_weights"),
        coefficients=torch.empty(0),
        advantages=column("advantages"),
        logprobs=column("logprobs"),
        old_logprobs=column("old_logprobs"),
        ref_logprobs=column("ref_logprobs"),
        values=column("values"),
        returns=column("returns"),
        temperatures=torch.tensor(
            [sample.temperature for sample, positions in zip(samples, own, strict=True) for _ in positions]
        ),
        kept_ids=torch.tensor([i for ids in kept for i in ids], dtype=torch.int64),
        kept_counts=torch.tensor([len(ids) for ids in kept], dtype=torch.int64),
    )


def _kept_ids(samples: Sequence[Sample]) -> list[list[int]]:
    """[T] of the loss tokens; empty when nothing was dropped for any."""
    if not any(sample.kept_ids for sample in samples):
        return []
    return [sample.kept_ids[t] if sample.kept_ids else [] for sample in samples for t in _loss_positions(sample)]


def _loss_positions(sample: Sample) -> list[int]:
    return [t for t, weight in enumerate(sample.loss_weights) if weight]
