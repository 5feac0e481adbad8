"""From samples to the tensors of one step: updates, micro-batches, and the counts that the loss divides by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sluice.algorithms.aggregation import token_coefficients
from sluice.algorithms.spec import Algorithm
from sluice.data.packing import Piece, pack_row, shared_length
from sluice.interfaces import Layout
from sluice.types import Sample

T = TypeVar("T")


@dataclass(frozen=True)
class Packing:
    """How the samples of a step are cut."""

    updates_per_batch: int
    tokens_per_micro_batch: int
    """Budget of input tokens, padding included and what samples share counted once; a sample that is longer goes alone."""
    layout: Layout
    num_ranks: int = 1
    """Micro-batches of an update come in a multiple of this, if it has so many samples: as many for each of them."""


@dataclass
class MicroBatch:
    """What one forward and backward sees. B × L are the input's shape, T counts the tokens that bear a loss."""

    samples: list[Sample]
    input_ids: Tensor  # [B, L]
    position_ids: Tensor  # [B, L]
    pieces: list[Piece] | None
    """What the one row of the packed layout is made of; in rows, padding comes last and nobody sees it."""
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
    routed_experts: Tensor
    """[B · L, layers · k] the experts that the engine's routers chose for each token of the input, -1 where that is not known; empty
    where nothing is."""

    def to(self, device: torch.device) -> MicroBatch:
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return MicroBatch(**{**vars(self), **moved})

    def parts(self, size: int) -> list[MicroBatch]:
        """Of at most `size` loss tokens each, in their order, and one at least; the input stays whole, and so do the samples."""
        if len(self.target_ids) <= size:
            return [self]
        columns = {k: v for k, v in vars(self).items() if isinstance(v, Tensor) and k not in _NOT_PER_TOKEN}
        parts = []
        for start in range(0, len(self.target_ids), size):
            own = {name: column[start : start + size] for name, column in columns.items()}
            first = int(self.kept_counts[:start].sum())
            kept_ids = self.kept_ids[first : first + int(own["kept_counts"].sum())]
            parts.append(replace(self, **own, kept_ids=kept_ids))
        return parts

    def fill(self, name: str, values: Tensor) -> None:
        """Write [T] values into a field of its samples."""
        for sample, row in zip(self.samples, self.spread(values, 0.0), strict=True):
            setattr(sample, name, row)

    def record(self, update: int, logprobs: Tensor, ratios: Tensor, clipped: Tensor) -> None:
        """Write what an update saw ([T] each) into its samples, for the ledger."""
        columns = self.spread(logprobs, 0.0), self.spread(ratios, 1.0), self.spread(clipped, False)
        for sample, *seen in zip(self.samples, *columns, strict=True):
            sample.update = update
            sample.current_logprobs, sample.ratios, sample.clipped = seen

    def spread(self, values: Tensor, empty: float | bool) -> list[list]:
        """[T] values as one list per sample over all of its tokens, `empty` where there is no loss."""
        own = _loss_mask(self.samples)
        numbers = values.cpu().numpy()
        spread = np.full(len(own), empty, dtype=numbers.dtype)
        spread[own] = numbers
        ends = accumulate(map(len, self.samples))
        return [spread[end - len(sample) : end].tolist() for sample, end in zip(self.samples, ends, strict=True)]


_FLOATS = (
    *("loss_weights", "coefficients", "advantages", "logprobs", "old_logprobs", "ref_logprobs", "values", "returns"),
    "temperatures",
)
_NOT_PER_TOKEN = {"input_ids", "position_ids", "kept_ids", "routed_experts"}


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
    """Parts of at most the budget, the longest sample first: one that does not fit the memory fails at once, not in hour 20."""
    cut = _row_parts if packing.layout == "rows" else _packed_parts
    parts = cut(samples, packing.tokens_per_micro_batch)
    num = -(-len(parts) // packing.num_ranks) * packing.num_ranks
    if packing.num_ranks > 1:
        parts = _as_even(samples, cut, packing.tokens_per_micro_batch, parts, num)
    while len(parts) % packing.num_ranks and len(parts) < len(samples):
        largest = max((i for i, part in enumerate(parts) if len(part) > 1), key=lambda i: _size(parts[i]))
        parts[largest : largest + 1] = _halves(parts[largest])
    return parts


def _as_even(
    samples: Sequence[Sample],
    cut: Callable[[Sequence[Sample], int], list[list[Sample]]],
    budget: int,
    parts: list[list[Sample]],
    num: int,
) -> list[list[Sample]]:
    """With the smallest budget, of some, that makes no more than `num` parts: the last part then is about as large as the others."""
    even = -(-sum(map(_size, parts)) // num)
    for eighth in range(8):
        smaller = even + (budget - even) * eighth // 8
        if smaller < budget and len(tried := cut(samples, smaller)) <= num:
            return tried
    return parts


def _size(part: Sequence[Sample]) -> int:
    """Tokens of a part, as its samples have them."""
    return sum(map(len, part))


def _halves(part: list[Sample]) -> list[list[Sample]]:
    """About equally many tokens in both, and a sample in each."""
    ends = list(accumulate(map(len, part)))
    cut = min(range(1, len(part)), key=lambda i: abs(2 * ends[i - 1] - ends[-1]))
    return [part[:cut], part[cut:]]


def deal(parts: Sequence[T], sizes: Sequence[int], num_ranks: int) -> list[list[T | None]]:
    """To each rank the same number of them, with None where there is none, and about the same size in all."""
    rounds = -(-len(parts) // num_ranks)
    hands: list[list[T | None]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for i in sorted(range(len(parts)), key=lambda i: -sizes[i]):
        rank = min((r for r in range(num_ranks) if len(hands[r]) < rounds), key=lambda r: totals[r])
        hands[rank].append(parts[i])
        totals[rank] += sizes[i]
    return [hand + [None] * (rounds - len(hand)) for hand in hands]


def _row_parts(samples: Sequence[Sample], budget: int) -> list[list[Sample]]:
    """Samples shorter than half the part's longest start a new part, so that padding stays below one half."""
    parts: list[list[Sample]] = []
    for sample in sorted(samples, key=len, reverse=True):
        width = len(parts[-1][0]) if parts else 0
        if not parts or (len(parts[-1]) + 1) * width > budget or 2 * len(sample) < width:
            parts.append([])
        parts[-1].append(sample)
    return parts


def _packed_parts(samples: Sequence[Sample], budget: int) -> list[list[Sample]]:
    """Groups stay together as far as they can, since they share their prompt; parts are about equally full."""
    by_group: dict[int, list[Sample]] = {}
    for sample in sorted(samples, key=len, reverse=True):  # so the groups, too, are in the order of their longest
        by_group.setdefault(sample.group, []).append(sample)
    shared = {number: shared_length(group) for number, group in by_group.items()}
    total = sum(sum(map(len, group)) - (len(group) - 1) * shared[number] for number, group in by_group.items())
    even = total / max(1, -(-total // budget))
    parts: list[list[Sample]] = []
    used = 0
    for sample in chain.from_iterable(by_group.values()):
        known = shared[sample.group] if parts and parts[-1][-1].group == sample.group else 0
        if not parts or used + len(sample) - known > budget or used >= even:
            parts.append([])
            used, known = 0, 0
        parts[-1].append(sample)
        used += len(sample) - known
    return parts


def collate(samples: Sequence[Sample], layout: Layout) -> MicroBatch:
    """The tensors of some samples."""
    samples = list(samples)
    lengths = [len(sample) for sample in samples]
    if layout == "rows":
        width = max(lengths)
        places = [np.arange(row * width, row * width + length) for row, length in enumerate(lengths)]
        input_ids = torch.tensor([sample.token_ids + [0] * (width - len(sample)) for sample in samples])
        position_ids = torch.arange(width).expand(len(samples), width)
        pieces = None
    else:
        row = pack_row(samples)
        places, pieces = row.places, row.pieces
        input_ids = torch.tensor([row.token_ids])
        positions = [np.arange(p.first_position, p.first_position + p.length) for p in pieces]
        position_ids = torch.from_numpy(np.concatenate(positions))[None]
    own = _loss_mask(samples)
    # a token is predicted from the state at the one before it
    before = np.concatenate([np.concatenate([place[:1], place[:-1]]) for place in places])
    counts = np.add.reduceat(own, np.cumsum([0, *lengths[:-1]]), dtype=np.int64)
    kept = _kept_ids(samples, own)

    def column(name: str, dtype: type = np.float32) -> Tensor:
        """[T], or empty where the samples do not have it (yet)."""
        rows = [getattr(sample, name) for sample in samples]
        if not all(rows):
            return torch.empty(0)
        return torch.from_numpy(_flat(rows, dtype)[own])

    return MicroBatch(
        samples=samples,
        input_ids=input_ids,
        position_ids=position_ids,
        pieces=pieces,
        hidden_index=torch.from_numpy(before[own]),
        target_ids=column("token_ids", np.int64),
        sequence_ids=torch.from_numpy(np.repeat(np.arange(len(samples)), counts)),
        loss_weights=column("loss_weights"),
        coefficients=torch.empty(0),
        advantages=column("advantages"),
        logprobs=column("logprobs"),
        old_logprobs=column("old_logprobs"),
        ref_logprobs=column("ref_logprobs"),
        values=column("values"),
        returns=column("returns"),
        temperatures=torch.from_numpy(
            np.repeat(np.array([sample.temperature for sample in samples], np.float32), counts)
        ),
        kept_ids=torch.from_numpy(_flat(kept, np.int64)),
        kept_counts=torch.tensor([len(ids) for ids in kept], dtype=torch.int64),
        routed_experts=_routed_experts(samples, places, input_ids.numel()),
    )


def nothing() -> MicroBatch:
    """A micro-batch without samples, of one token that bears no loss: for a rank that has none left while the others go on."""
    empty, index = torch.empty(0), torch.empty(0, dtype=torch.int64)
    return MicroBatch(
        samples=[],
        input_ids=torch.zeros(1, 1, dtype=torch.int64),
        position_ids=torch.zeros(1, 1, dtype=torch.int64),
        pieces=[Piece(0, 1, None)],
        hidden_index=index,
        target_ids=index,
        sequence_ids=index,
        kept_ids=index,
        kept_counts=index,
        routed_experts=index,
        **dict.fromkeys(_FLOATS, empty),
    )


def _flat(rows: Sequence[Sequence[float]], dtype: type) -> np.ndarray:
    return np.array(list(chain.from_iterable(rows)), dtype=dtype)


def _loss_mask(samples: Sequence[Sample]) -> np.ndarray:
    """[all tokens] which of them bear a loss."""
    return _flat([sample.loss_weights for sample in samples], np.float64) != 0


def _kept_ids(samples: Sequence[Sample], own: np.ndarray) -> list[list[int]]:
    """[T] of the loss tokens; empty when nothing was dropped for any."""
    if not any(sample.kept_ids for sample in samples):
        return []
    every = [ids for sample in samples for ids in (sample.kept_ids or [[]] * len(sample))]
    return [every[t] for t in np.flatnonzero(own)]


def _routed_experts(samples: Sequence[Sample], places: Sequence[np.ndarray], num_positions: int) -> Tensor:
    """[positions, layers · k], from where in the input the tokens of each sample lie."""
    chosen = [own for sample in samples for own in (sample.routed_experts or [b""] * len(sample))]
    known = np.array([bool(own) for own in chosen])
    if not known.any():
        return torch.empty(0, dtype=torch.int16)
    numbers = np.frombuffer(b"".join(chosen), "<u2").astype(np.int16).reshape(int(known.sum()), -1)
    routed = np.full((num_positions, numbers.shape[1]), -1, np.int16)
    routed[np.concatenate(places)[known]] = numbers
    return torch.from_numpy(routed)
