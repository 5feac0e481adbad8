"""What lies between the matrix products of a decode step on a GPU, in one kernel each: by itself it takes torch six or seven.

A small kernel takes some microseconds whatever it computes, so of a small model's step they would be the most.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor


@triton.jit
def _turn_and_write(
    qkv, norm, turns, positions, queries, keys, values,  # pointers
    slot_stride, position_stride, head_stride,
    eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, IS_NORMED: tl.constexpr,
):  # fmt: skip
    """One head of one token. HALF: the next power of two of half a head's SIZE."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, HALF)
    inside = pair < SIZE // 2
    source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * SIZE + 2 * pair
    x = tl.load(source, inside, 0.0)
    y = tl.load(source + 1, inside, 0.0)
    position = tl.load(positions + row)
    if head < HEADS + KV_HEADS:
        a, b = x.to(tl.float32), y.to(tl.float32)
        if IS_NORMED:  # rounded where torch rounds
            scale = 1 / tl.sqrt((tl.sum(a * a) + tl.sum(b * b)) / SIZE + eps)
            weight = norm + head * SIZE + 2 * pair
            a = (a * scale).to(x.dtype).to(tl.float32) * tl.load(weight, inside, 0.0).to(tl.float32)
            b = (b * scale).to(x.dtype).to(tl.float32) * tl.load(weight + 1, inside, 0.0).to(tl.float32)
            a, b = a.to(x.dtype).to(tl.float32), b.to(x.dtype).to(tl.float32)
        turn = turns + (row * (SIZE // 2) + pair) * 2
        cos, sin = tl.load(turn, inside, 0.0), tl.load(turn + 1, inside, 0.0)
        x, y = (a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)
    cached = row * slot_stride + position * position_stride + 2 * pair
    if head < HEADS:
        target = queries + (row * HEADS + head) * SIZE + 2 * pair
    elif head < HEADS + KV_HEADS:
        target = keys + cached + (head - HEADS) * head_stride
    else:
        target = values + cached + (head - HEADS - KV_HEADS) * head_stride
    tl.store(target, x, inside)
    tl.store(target + 1, y, inside)


def turn_and_write(
    qkv: Tensor, norm: Tensor | None, turns: Tensor, positions: Tensor, keys: Tensor, values: Tensor, eps: float
) -> Tensor:
    """Queries, keys and values of one token for each sequence: norm and turn the first two and put the last two into the cache.

    qkv [n, heads + 2 · kv heads, d] with the elements of a head in pairs, norm [heads + kv heads, d], turns [n, 1, d / 2] complex,
    positions [n], keys [slots, kv heads, d, capacity] and values [slots, kv heads, capacity, d] of a cache that lies token by
    token. Returns the queries, [n, heads, d].
    """
    n, all_heads, size = qkv.shape
    kv_heads = keys.shape[1]
    heads = all_heads - 2 * kv_heads
    queries = qkv.new_empty(n, heads, size)
    kernel: Any = _turn_and_write
    kernel[(n, all_heads)](
        qkv, qkv if norm is None else norm, torch.view_as_real(turns), positions, queries, keys, values,
        keys.stride(0), keys.stride(3), keys.stride(1),
        eps,
        HEADS=heads, KV_HEADS=kv_heads, SIZE=size, HALF=triton.next_power_of_2(size // 2), IS_NORMED=norm is not None,
        num_warps=1,
    )  # fmt: skip
    return queries


_QUERIES = 16
"""Rows of the smallest matrix that a GPU's matrix units take."""
_KEYS = 64


@triton.jit
def _attend(
    queries, keys, values, seen, positions,  # pointers
    slot_stride, position_stride, head_stride,
    scaling, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    IS_WINDOWED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The query heads of one token that share a key head. WIDTH: the next power of two of a head's SIZE."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(positions + row).to(tl.int32) + 1
    member, element, key = tl.arange(0, QUERIES), tl.arange(0, WIDTH), tl.arange(0, KEYS)
    at = ((row * KV_HEADS + kv_head) * GROUP + member[:, None]) * SIZE + element[None]
    is_query = (member[:, None] < GROUP) & (element[None] < SIZE)
    query = tl.load(queries + at, is_query, 0.0)
    slot = row * slot_stride + kv_head * head_stride + element[None]
    first = 0
    if IS_WINDOWED:
        first = tl.maximum(length - window, 0)
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(first, length, KEYS):
        is_seen = start + key < length
        here = slot + (start + key[:, None]) * position_stride
        inside = is_seen[:, None] & (element[None] < SIZE)
        scores = tl.dot(query, tl.trans(tl.load(keys + here, inside, 0.0))) * scaling
        scores = tl.where(is_seen[None], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights, kept = tl.exp(scores - higher[:, None]), tl.exp(highest - higher)
        total = total * kept + tl.sum(weights, 1)
        value = tl.load(values + here, inside, 0.0)
        result = tl.dot(weights.to(value.dtype), value, result * kept[:, None])
        highest = higher
    tl.store(seen + at, (result / total[:, None]).to(query.dtype), is_query)


def attend(
    positions: Tensor, scaling: float, queries: Tensor, keys: Tensor, values: Tensor, window: int | None
) -> Tensor:
    """[n, heads, d] queries at `positions` [n] over the cached keys and values up to there, these included, and with a window only
    the last so many → [n, heads · d]."""
    n, heads, size = queries.shape
    kv_heads = keys.shape[1]
    seen = torch.empty_like(queries)
    kernel: Any = _attend
    kernel[(n, kv_heads)](
        queries, keys, values, seen, positions,
        keys.stride(0), keys.stride(3), keys.stride(1),
        scaling, window or 0,
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, SIZE=size, WIDTH=max(16, triton.next_power_of_2(size)),
        IS_WINDOWED=window is not None, QUERIES=max(_QUERIES, triton.next_power_of_2(heads // kv_heads)), KEYS=_KEYS,
    )  # fmt: skip
    return seen.flatten(1)


_BLOCK = 1024


@triton.jit
def _silu_product(gate_up, product, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    source = gate_up + row * 2 * width + column
    gate = tl.load(source, inside, 0.0)
    up = tl.load(source + width, inside, 0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(product + row * width + column, (silu * up).to(gate.dtype), inside)


def silu_product(gate_up: Tensor) -> Tensor:
    """silu(gate) · up: [n, 2F] → [n, F]."""
    n, width = gate_up.shape[0], gate_up.shape[1] // 2
    product = gate_up.new_empty(n, width)
    kernel: Any = _silu_product
    kernel[(n, triton.cdiv(width, _BLOCK))](gate_up, product, width, BLOCK=_BLOCK)
    return product
