"""Adapters of a model of which each rank holds a shard: those are sharded like it, and it is not trained.

Weights are merged shard by shard, and only then put together: no rank has more of the merged model than of one that has no adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from sluice.trainers.fsdp import ParallelState, ShardedModel, local, whole
from sluice.trainers.lora import (
    adapter_of,
    add_adapters,
    check_base,
    factors,
    merged,
    merged_weight,
    weights_apart,
    write_adapter,
)
from sluice.trainers.model import PolicyModel, weights_of
from sluice.weights.fingerprint import fingerprint


class ShardedLoraModel(ShardedModel):
    """Shards of its base weights have the outline's dtype, those of the adapters are in FP32."""

    def __init__(
        self,
        outline: PolicyModel,
        whole: PolicyModel | None,
        parallel: ParallelState,
        dtype: torch.dtype,
        *,
        rank: int,
        alpha: float,
        targets: Sequence[str],
        seed: int,
        apart: bool = False,
        cpu_offload: bool = False,
    ) -> None:
        """As `ShardedModel` and `LoraModel`: with the same seed the adapters begin with the same numbers."""
        base = [whole and fingerprint(whole.named_weights())]
        dist.broadcast_object_list(base, 0, group=parallel.words)
        self._base_fingerprint: Any = base[0]
        self._apart = apart
        if whole:
            add_adapters(whole, rank, alpha, targets, seed)
        self.settings = add_adapters(outline, rank, alpha, targets, seed)
        for param in outline.model.parameters():
            if param.requires_grad:
                param.data = param.data.float()
        super().__init__(outline, whole, parallel, dtype, cpu_offload=cpu_offload)

    def published(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        return merged(self.model, super().published(tensors), self._merged_shard)

    @torch.no_grad()
    def _merged_shard(self, layer: Any) -> Tensor:
        """B is divided as W is by its rows, and A as W is by its columns if at all: of A's rows each rank needs all."""
        weight, a, b, scaling = factors(layer)
        a = a.detach().to(self.dtype)
        if isinstance(a, DTensor):
            a = a.redistribute(placements=[Replicate(), *a.placements[1:]])
        return self.parallel.like(weight, merged_weight(local(weight), local(a), local(b).to(self.dtype), scaling))

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        if not self._apart:
            return super().named_weights()
        shards = weights_apart(self.model, super().published(weights_of(self.model)))
        return ((name, whole(shard)) for name, shard in shards)

    def export(self) -> Callable[[str], None]:
        write_weights, write_adapter = super().export(), self.export_adapter()

        def write(folder: str) -> None:
            write_weights(folder)
            write_adapter(folder)

        return write

    def export_adapter(self) -> Callable[[str], None]:
        """As that of a model in one process; rank 0 writes."""
        adapter = self.copied_whole((name, t.to(self.dtype)) for name, t in adapter_of(self.model).items())
        if adapter is None:
            return lambda folder: None
        return lambda folder: write_adapter(folder, self.settings, adapter, self._base_fingerprint)

    def check_base(self, folder: str) -> None:
        check_base(folder, self._base_fingerprint)
