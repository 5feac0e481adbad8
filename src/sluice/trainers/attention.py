"""Attention over packed rows, as an attention implementation that `transformers` models call by name.

A packed row has no padding, so everything but attention is computed on real tokens only. Attention sees each piece of the row
apart: with the variable-length kernel of a GPU where that can be used, else in blocks of pieces of similar length.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sluice.data.packing import Piece
from sluice.trainers.chunks import SHORT_ATTENTION

NAME = "sluice"


@dataclass
class _Block:
    """Pieces of similar length that continue prefixes of one length, padded to the longest."""

    pieces: list[Piece]
    length: int
    prefix_length: int
    owners: Tensor | None
    """[kv heads · pieces] which row of the prefixes' own block each continues."""
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict[Any, Tensor])

    def mask(self, window: int | None, like: Tensor) -> Tensor:
        """[length, prefix + length]: 0 where a query sees a key, -inf where not."""
        key = (window, like.dtype)
        if key not in self.masks:
            at = torch.arange(self.prefix_length, self.prefix_length + self.length, device=like.device)[:, None]
            keys = torch.arange(self.prefix_length + self.length, device=like.device)
            hidden = keys > at
            if window is not None:
                hidden |= keys <= at - window
            self.masks[key] = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(
                hidden, -torch.inf
            )
        return self.masks[key]


class _IntoBlocks(torch.autograd.Function):
    """Rows of a matrix in the order of the blocks, with any row as padding; `inverse` says where each row went.

    The gradient is gathered from there, which is much faster than adding it up; that of padding is left behind.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse), None, None


class _OutOfBlocks(torch.autograd.Function):
    """The way back: rows of the blocks in their old order. What only was padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, padding: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, padding)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, padding = ctx.saved_tensors
        return gradients[0].index_select(0, inverse).index_fill_(0, padding, 0.0), None, None, None


class PackedAttention:
    """How one packed row attends: the same in every layer, so it is worked out once."""

    def __init__(self, pieces: Sequence[Piece], heads: int, kv_heads: int, device: torch.device) -> None:
        self.pieces = pieces
        self.heads, self.kv_heads, self.device = heads, kv_heads, device
        self.num_tokens = sum(piece.length for piece in pieces)
        self._varlen: tuple[Tensor, Tensor, Tensor, int, int] | None = None
        self._blocks: list[_Block] | None = None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """[1, heads, T, d], [1, kv heads, T, d] twice → [1, T, heads, d]."""
        fits = query.dtype != torch.float32 and query.shape[-1] <= 256 and softcap is None
        if VARLEN and fits and query.is_cuda and torch.cuda.get_device_capability(self.device) >= (8, 0):
            return self._by_kernel(query, key, value, scaling, window)
        return self._by_blocks(query, key, value, scaling, window, softcap)

    # -- on a GPU --

    def _by_kernel(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        if self._varlen is None:
            self._varlen = self._sequences()
        keys_at, ends, key_ends, longest, longest_keys = self._varlen
        k, v = (x[0].transpose(0, 1).index_select(0, keys_at) for x in (key, value))
        assert VARLEN is not None
        out = VARLEN(
            query[0].transpose(0, 1).contiguous(),
            k,
            v,
            ends,
            key_ends,
            longest,
            longest_keys,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),  # causal, counted from the end of the keys
            **_SHARED_HEADS,
        )
        return out[None]

    def _sequences(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Where the keys of all pieces lie, one after the other; the ends of queries and keys; the longest of each."""
        keys = []
        for piece in self.pieces:
            if piece.prefix:
                keys.append(torch.arange(piece.prefix.start, piece.prefix.start + piece.prefix.length))
            keys.append(torch.arange(piece.start, piece.start + piece.length))
        lengths = torch.tensor([0, *(p.length for p in self.pieces)])
        key_lengths = torch.tensor([0, *(p.first_position + p.length for p in self.pieces)])
        ends, key_ends = (x.cumsum(0).to(self.device, torch.int32) for x in (lengths, key_lengths))
        return torch.cat(keys).to(self.device), ends, key_ends, int(lengths.max()), int(key_lengths.max())

    # -- in blocks --

    def _by_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> Tensor:
        if self._blocks is None:
            self._blocks = self._cut()
        d = query.shape[-1]
        q = _IntoBlocks.apply(query.reshape(-1, d), self._queries_at, self._queries_from)
        k = _IntoBlocks.apply(key.reshape(-1, d), self._keys_at, self._keys_from)
        v = _IntoBlocks.apply(value.reshape(-1, value.shape[-1]), self._keys_at, self._keys_from)
        group = self.heads // self.kv_heads
        sizes = [self.kv_heads * len(b.pieces) * b.length for b in self._blocks]
        blocked: dict[int, tuple[Tensor, Tensor]] = {}
        seen = []
        parts: Any = zip(
            self._blocks, q.split([group * size for size in sizes]), k.split(sizes), v.split(sizes), strict=True
        )
        for block, bq, bk, bv in parts:
            bq = bq.view(-1, group, block.length, d)
            bk, bv = (x.view(len(bq), block.length, -1) for x in (bk, bv))
            if block.owners is None:
                blocked.setdefault(block.length, (bk, bv))  # prefixes come first
            else:
                prefix = blocked[block.prefix_length]
                bk, bv = (
                    torch.cat([p.index_select(0, block.owners), x], 1) for p, x in zip(prefix, (bk, bv), strict=True)
                )
            seen.append(_attend(block, bq, bk, bv, scaling, window, softcap).reshape(-1, bv.shape[-1]))
        out = _OutOfBlocks.apply(torch.cat(seen), self._output_from, self._output_at, self._padding)
        return out.view(1, self.num_tokens, self.heads, -1)

    def _cut(self) -> list[_Block]:
        """Blocks, the prefixes' first, and where each row of theirs comes from and goes to."""
        prefixes: dict[int, list[Piece]] = defaultdict(list)
        others: dict[int, list[Piece]] = defaultdict(list)
        shared = {id(piece.prefix) for piece in self.pieces}
        for piece in self.pieces:
            if id(piece) in shared:
                prefixes[piece.length].append(piece)
            else:
                others[piece.first_position].append(piece)
        blocks = [_Block(own, length, 0, None) for length, own in prefixes.items()]
        row_of = {id(piece): row for own in prefixes.values() for row, piece in enumerate(own)}
        for prefix_length, own in others.items():
            for similar in _similar(own):
                owners = None
                if prefix_length:
                    rows = torch.tensor([row_of[id(piece.prefix)] for piece in similar])
                    per_head = torch.arange(self.kv_heads)[:, None] * len(prefixes[prefix_length])
                    owners = (per_head + rows).flatten().to(self.device)
                blocks.append(_Block(similar, similar[0].length, prefix_length, owners))
        self._index(blocks)
        return blocks

    def _index(self, blocks: list[_Block]) -> None:
        T, group = self.num_tokens, self.heads // self.kv_heads
        queries, keys = [], []
        for block in blocks:
            at = torch.full((len(block.pieces), block.length), -1)
            for row, piece in zip(at, block.pieces, strict=True):
                row[: piece.length] = torch.arange(piece.start, piece.start + piece.length)
            queries.append(_by_head(at, T, self.kv_heads, group))
            keys.append(_by_head(at, T, self.kv_heads, 1))
        self._padding = (torch.cat(queries) < 0).nonzero()[:, 0].to(self.device)
        self._queries_at, self._queries_from = self._both_ways(torch.cat(queries), self.heads * T)
        self._keys_at, self._keys_from = self._both_ways(torch.cat(keys), self.kv_heads * T)
        # of the output, token by token instead of head by head
        self._output_from = self._queries_from.view(self.heads, T).t().reshape(-1)
        head, token = self._queries_at // T, self._queries_at % T
        self._output_at = token * self.heads + head

    def _both_ways(self, index: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """An index with -1 for padding: with something in its place, and where each of `num` rows is found in it."""
        real = index >= 0
        inverse = torch.empty(num, dtype=torch.int64)
        inverse[index[real]] = real.nonzero()[:, 0]
        return index.clamp(min=0).to(self.device), inverse.to(self.device)


def _by_head(at: Tensor, num_tokens: int, kv_heads: int, group: int) -> Tensor:
    """[pieces, length] places in the row → flat [kv heads, pieces, group, length] rows of a [heads · T, d] matrix."""
    head = torch.arange(kv_heads * group).view(kv_heads, 1, group, 1)
    return torch.where(at[:, None] < 0, -1, head * num_tokens + at[:, None]).flatten()


def _similar(pieces: list[Piece]) -> list[list[Piece]]:
    """The longest first; a piece that would be padded by a quarter and more than a few tokens begins another block."""
    blocks: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: -piece.length):
        longest = blocks[-1][0].length if blocks else 0
        if not blocks or longest - piece.length > max(8, longest // 4):
            blocks.append([])
        blocks[-1].append(piece)
    return blocks


def _attend(
    block: _Block, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """[N, group, L, d], [N, K, d] twice → [N, group, L, d]: heads of a group share keys and values."""
    num, group, length, d = q.shape
    if softcap is not None or (k.shape[1] <= SHORT_ATTENTION and q.dtype == torch.float32):
        mask = block.mask(window, q).repeat(group, 1)
        scores = torch.bmm(q.reshape(num, group * length, d), k.mT) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = torch.softmax(scores + mask, -1, torch.float32).to(v.dtype)
        return torch.bmm(weights, v).view(num, group, length, -1)
    plain = block.owners is None and (window is None or block.length <= window)
    return F.scaled_dot_product_attention(
        q,
        k[:, None],
        v[:, None],
        attn_mask=None if plain else block.mask(window, q),
        is_causal=plain,
        scale=scaling,
        enable_gqa=True,
    )


def _varlen_kernel() -> tuple[Callable[..., Tensor] | None, dict[str, bool]]:
    """torch's variable-length attention if it takes a scale and a window, and what later versions want to be told where query
    heads share key heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, {}
    known = inspect.signature(varlen_attn).parameters
    kernel: Any = varlen_attn if {"scale", "window_size"} <= known.keys() else None
    return kernel, {"enable_gqa": True} if "enable_gqa" in known else {}


VARLEN, _SHARED_HEADS = _varlen_kernel()


@torch.compiler.disable  # it gathers by indices that differ from row to row
def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed: PackedAttention | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a model calls: packed rows as above, and everything else through torch's fused attention."""
    if packed is not None:
        return packed.attend(query, key, value, scaling, sliding_window, softcap), None
    if softcap is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).mT * scaling
    scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is None:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    weights = torch.softmax(scores.masked_fill(~attention_mask, -torch.inf), -1, torch.float32).to(value.dtype)
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None


def register() -> None:
    """Make it known to `transformers` under its name, with the masks of torch's fused attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
