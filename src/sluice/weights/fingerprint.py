"""A short word for weights: two models with the same word hold the same numbers, bit for bit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
_OF_ALL = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_OF_ALL |= {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
"""What a weight of one expert is a part of, among those of all experts of a layer."""

Part = tuple[str, Sequence[int], str, int]
"""Of one tensor: name, shape, dtype, and the sum of its bits."""


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """16 hex digits of the names, shapes and bits of some tensors, in any order, of any dtype and on any device.

    Each tensor's bits are summed as whole numbers, modulo 2**64: a pass over the memory and no more. Values that only
    changed places within a tensor go unseen.
    """
    return combined(parts(weights))


def parts(weights: Iterable[tuple[str, Tensor]]) -> list[Part]:
    """What the fingerprint is made of. The sum over a tensor is that of the sums over its shards, modulo 2**64."""
    seen = [
        (name, tuple(t.shape), str(t.dtype), _sum_of_bits(t)) for name, t in weights
    ]  # which may exist one at a time only
    sums: list[int] = torch.stack([total for *_, total in seen]).tolist() if seen else []
    return [(name, shape, dtype, total) for (name, shape, dtype, _), total in zip(seen, sums, strict=True)]


def combined(found: Iterable[Part]) -> str:
    """The fingerprint of which these are the parts, each name once."""
    parts = sorted(_joined(found))
    text = "".join(f"{name} {tuple(shape)} {dtype} {total}\n" for name, shape, dtype, total in parts)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _joined(found: Iterable[Part]) -> list[Part]:
    """With the weights of all experts of a layer as one, as `transformers` has them where it computes; in its files it has them apart."""
    whole: dict[str, Part] = {}
    for name, shape, dtype, total in found:
        name = name.replace(".block_sparse_moe.", ".mlp.")  # of Mixtral
        if match := _EXPERT.fullmatch(name):
            layer, expert, own = match.groups()
            name = f"{layer}.{_OF_ALL[own]}"
            _, (num, rows, _), _, before = whole.get(name, (name, (0, 0, 0), dtype, 0))
            rows += shape[0] if expert == "0" else 0  # of gate and up
            shape, total = (max(num, int(expert) + 1), rows, shape[1]), (before + total + 2**63) % 2**64 - 2**63
        whole[name] = name, shape, dtype, total
    return list(whole.values())


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Eight bytes at a time, which is several times as fast as the tensor's own width; what is left over at that width."""
    flat = tensor.detach().contiguous().flatten()
    own = _INTEGERS[flat.element_size()]
    per_word = 8 // flat.element_size()
    if flat.storage_offset() % per_word:
        flat = flat.clone()
    whole = len(flat) - len(flat) % per_word
    return flat[:whole].view(torch.int64).sum() + flat[whole:].view(own).sum(dtype=torch.int64)
