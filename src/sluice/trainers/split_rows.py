"""Context parallelism: the tokens of a row are divided over ranks, and in attention its heads are.

Each rank computes its share of the tokens through norms and linear layers. Before attention all ranks exchange, so that each has all
tokens of its share of the heads, and after it they exchange back (DeepSpeed-Ulysses, arXiv 2309.14509). So attention itself needs
to know nothing of it: windows and shared prefixes work as they do on one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sluice.data.packing import Piece
from sluice.trainers.attention import PackedAttention


class SplitAttention(PackedAttention):
    """Attention of a packed row of which this rank has a share of the tokens."""

    def __init__(
        self, pieces: Sequence[Piece], heads: int, kv_heads: int, device: torch.device, group: dist.ProcessGroup
    ) -> None:
        size = group.size()
        super().__init__(pieces, heads // size, kv_heads // size, device)
        self.group = group

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """[1, heads, T / ranks, d] and those of keys and values → [1, T / ranks, heads, d]."""
        q, k, v = (_Exchange.apply(x, 1, 2, self.group) for x in (query, key, value))
        out = super().attend(q, k, v, scaling, window, softcap)
        return _Exchange.apply(out, 1, 2, self.group)  # type: ignore[return-value]


class _Exchange(torch.autograd.Function):
    """A tensor of which each rank has all of dimension `whole` and its share of `shared`, the other way round: dimension `whole` is
    divided and `shared` is put together, in the order of the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: int, shared: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dims, ctx.group = (whole, shared), group
        return _exchanged(x, whole, shared, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        whole, shared = ctx.dims
        return _exchanged(gradients[0], shared, whole, ctx.group), None, None, None


def _exchanged(x: Tensor, whole: int, shared: int, group: dist.ProcessGroup) -> Tensor:
    parts = torch.stack(x.chunk(group.size(), whole)).contiguous()
    out = torch.empty_like(parts)
    dist.all_to_all_single(out, parts, group=group)
    return torch.cat(out.unbind(), shared)


class Gather(torch.autograd.Function):
    """[1, T / ranks, H] shares of a row → the whole [1, T, H] on each rank. All ranks go on to the same gradient of it, of which each
    takes its share."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(share) for _ in range(group.size())]
        dist.all_gather(parts, share.contiguous(), group=group)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].chunk(ctx.group.size(), 1)[ctx.group.rank()].contiguous(), None


def share_of(row: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's tokens of a [1, T] row whose length the number of ranks divides."""
    return row.chunk(group.size(), 1)[group.rank()].contiguous()


def padded(
    ids: Tensor, positions: Tensor, pieces: Sequence[Piece], multiple: int
) -> tuple[Tensor, Tensor, list[Piece]]:
    """A [1, T] row with a piece of its own at the end that nobody else sees, so that `multiple` divides its length."""
    missing = -ids.shape[1] % multiple
    if not missing:
        return ids, positions, list(pieces)
    pad = torch.zeros(1, missing, dtype=ids.dtype, device=ids.device)
    places = torch.arange(missing, device=ids.device)[None]
    return torch.cat([ids, pad], 1), torch.cat([positions, places], 1), [*pieces, Piece(ids.shape[1], missing, None)]
