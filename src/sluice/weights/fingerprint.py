"""A short word for weights: two models with the same word hold the same numbers, bit for bit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_EXPERT = re.compile(r"(.+\.experts\.\d+)\.(w1|w2|w3)\.weight")
_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""Of the matrices of an expert, by Mixtral's names."""

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
        (name, tuple(t.shape), str(t.dtype), _sum_of_bits(t)) for name, t in one_by_one(weights)
    ]  # which may exist one at a time only
    sums: list[int] = torch.stack([total for *_, total in seen]).tolist() if seen else []
    return [(name, shape, dtype, total) for (name, shape, dtype, _), total in zip(seen, sums, strict=True)]


def one_by_one(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """With each expert of a layer for itself, as `transformers` has them in files, and not all as one, as it has them where it computes."""
    for name, weight in weights:
        name = name.replace(".block_sparse_moe.", ".mlp.")  # of Mixtral
        layer, _, own = name.rpartition(".")
        if layer.endswith(".experts") and own in ("gate_up_proj", "down_proj") and weight.dim() == 3:
            for number, expert in enumerate(weight):
                names = ("gate_proj", "up_proj") if own == "gate_up_proj" else ("down_proj",)
                for part, matrix in zip(names, expert.chunk(len(names)), strict=True):
                    yield f"{layer}.{number}.{part}.weight", matrix
        elif match := _EXPERT.fullmatch(name):
            yield f"{match[1]}.{_NAMES[match[2]]}.weight", weight
        else:
            yield name, weight


def combined(found: Iterable[Part]) -> str:
    """The fingerprint of which these are the parts, each name once."""
    text = "".join(f"{name} {tuple(shape)} {dtype} {total}\n" for name, shape, dtype, total in sorted(found))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Eight bytes at a time, which is several times as fast as the tensor's own width; what is left over at that width."""
    flat = tensor.detach().contiguous().flatten()
    own = _INTEGERS[flat.element_size()]
    per_word = 8 // flat.element_size()
    if flat.storage_offset() % per_word:
        flat = flat.clone()
    whole = len(flat) - len(flat) % per_word
    return flat[:whole].view(torch.int64).sum() + flat[whole:].view(own).sum(dtype=torch.int64)
