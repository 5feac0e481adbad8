"""One packed row: samples one after the other without padding, and what the samples of a group begin with only once.

A token's hidden state depends on what is before it, so one forward of a prompt serves all answers to it, and its gradient is
the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from sluice.types import Sample


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a packed row: what several samples begin with, or a sample's own."""

    start: int
    length: int
    prefix: Piece | None
    """What it continues, if anything; its tokens see those of the prefix, and each other causally."""

    @property
    def first_position(self) -> int:
        return self.prefix.length if self.prefix else 0


@dataclass(frozen=True)
class PackedRow:
    token_ids: list[int]
    pieces: list[Piece]
    places: list[NDArray[np.int64]]
    """By sample: where in the row each of its tokens lies."""


def pack_row(samples: Sequence[Sample]) -> PackedRow:
    """Neighbours of one group share what all of them begin with."""
    token_ids: list[int] = []
    pieces: list[Piece] = []
    places: list[NDArray[np.int64]] = []

    def add(tokens: list[int], prefix: Piece | None) -> Piece:
        pieces.append(Piece(len(token_ids), len(tokens), prefix))
        token_ids.extend(tokens)
        return pieces[-1]

    for _, members in groupby(samples, key=lambda sample: sample.group):
        group = list(members)
        shared = shared_length(group)
        prefix = add(group[0].token_ids[:shared], None) if shared else None
        for sample in group:
            own = add(sample.token_ids[shared:], prefix)
            begins = [] if prefix is None else [np.arange(prefix.start, prefix.start + shared)]
            places.append(np.concatenate([*begins, np.arange(own.start, own.start + own.length)]))
    return PackedRow(token_ids, pieces, places)


def shared_length(group: Sequence[Sample]) -> int:
    """Tokens that all of these samples begin with, by the same experts where these are known, while each keeps one of its own; 0 for a
    single sample."""
    if len(group) == 1:
        return 0
    ids = [sample.token_ids for sample in group]
    first, last = min(ids), max(ids)  # all others lie between them, so they begin with what these two begin with
    differs = (t for t, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    shared = min(next(differs, len(first)), min(map(len, ids)) - 1)
    routed = [sample.routed_experts[:shared] for sample in group]
    if all(own == routed[0] for own in routed):
        return shared
    rows = zip(*(own or [b""] * shared for own in routed), strict=True)
    return next((t for t, row in enumerate(rows) if len(set(row)) > 1), shared)
