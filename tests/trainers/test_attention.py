"""The two ways through a packed row give the same: blocks, and a GPU's kernel for sequences of various lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sluice.data.packing import Piece
from sluice.trainers import attention
from sluice.trainers.attention import PackedAttention

PROMPT, OTHER = Piece(0, 5, None), Piece(20, 7, None)
PIECES = [
    PROMPT,
    Piece(5, 9, PROMPT),
    Piece(14, 6, PROMPT),
    OTHER,
    Piece(27, 3, OTHER),
    Piece(30, 140, OTHER),
    Piece(170, 4, None),
]


def kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    key_ends: Tensor,
    longest: int,
    longest_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` documents, which runs on a GPU only: [T, heads, d] → [T, heads, d]."""
    left, right = window_size
    assert right == 0
    out = []
    group = query.shape[1] // key.shape[1]
    assert enable_gqa
    for i in range(len(ends) - 1):
        q = query[ends[i] : ends[i + 1]].transpose(0, 1)
        k, v = (x[key_ends[i] : key_ends[i + 1]].transpose(0, 1).repeat_interleave(group, 0) for x in (key, value))
        assert q.shape[1] <= longest
        assert k.shape[1] <= longest_keys
        at = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]  # the last query sees the last key
        hidden = torch.arange(k.shape[1]) > at
        if left >= 0:
            hidden |= torch.arange(k.shape[1]) < at - left
        weights = (q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        out.append((weights @ v).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_blocks_and_kernel_agree(monkeypatch: pytest.MonkeyPatch, window: int | None, kv_heads: int) -> None:
    """On values and on the gradients of queries, keys and values."""
    monkeypatch.setattr(attention, "VARLEN", kernel)
    generator = torch.Generator().manual_seed(0)

    def states(heads: int) -> Tensor:
        return torch.randn(1, heads, 174, 8, generator=generator).requires_grad_()

    inputs = [states(4), states(kv_heads), states(kv_heads)]
    upstream = torch.randn(1, 174, 4, 8, generator=generator)
    packed = PackedAttention(PIECES, 4, kv_heads, torch.device("cpu"))
    found: list[Any] = []
    for way in (
        lambda: packed._by_blocks(inputs[0], inputs[1], inputs[2], 0.3, window, None),
        lambda: packed._by_kernel(inputs[0], inputs[1], inputs[2], 0.3, window),
    ):
        out = way()
        found.append([out.detach(), *torch.autograd.grad(out, inputs, upstream)])
    for blocks, by_kernel in zip(*found, strict=True):
        assert (blocks - by_kernel).abs().max() < 1e-5
