"""The optimiser of a model of which each rank holds a shard."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from sluice.trainers.fsdp import ParallelState, ShardedModel, local
from sluice.trainers.optim import Optimizer, OptimizerSettings
from sluice.trainers.tensor_parallel import PER_HEAD


class ShardedOptimizer(Optimizer):
    """Steps this rank's shards, plain tensors that share their memory with the sharded weights, and clips by the norm over all ranks."""

    def __init__(
        self,
        module: nn.Module,
        settings: OptimizerSettings,
        num_updates: int,
        owner: str = "policy",
        *,
        parallel: ParallelState,
        model: ShardedModel | None = None,
    ) -> None:
        """`model` is the one whose head has its gradient from `gradient_of`."""
        self.parallel = parallel
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        super().__init__(module, settings, num_updates, owner)
        self._head = model
        self._head_sums: dict[str, Tensor] = {}
        self._per_head = [name.split(".")[-2] in PER_HEAD if "." in name else False for name in self.names]

    def _make_masters(self) -> list[Tensor]:
        self.own_masters = False
        return [local(p) for p in self.params]

    def gradient_of(self, param: Tensor) -> Tensor | None:
        """Of a weight of the head, while that is whole: a sum over this rank's tokens, for `collect_gradients` to sum over the ranks."""
        assert self._head is not None
        for name, own in self._head.head.named_parameters():
            if own is param and own.requires_grad:
                sums = self._head_sums[name] = torch.zeros(own.shape, dtype=torch.float32, device=own.device)
                return None if self.parallel.repeats_head else sums
        return None

    def collect_gradients(self) -> None:
        """After each backward, on all ranks: what FSDP has reduced, and what it does not know of."""
        for param, master, per_head in zip(self.params, self.masters, self._per_head, strict=True):
            if param.grad is None:
                continue
            gradient = local(param.grad).float()
            param.grad = None
            if per_head and self.parallel.degrees.tensor > 1:
                dist.all_reduce(gradient, group=self.parallel.tensor.get_group())
            if not isinstance(param, DTensor) and self.parallel.repeats_head:
                gradient.zero_()
            _add(master, gradient)
        for name, sums in self._head_sums.items():
            assert self._head is not None
            shard = self._head.head_shards[name]
            at = next(i for i, p in enumerate(self.params) if p is shard)
            assert isinstance(shard, DTensor)
            partial = DTensor.from_local(sums, self.parallel.shards, [Partial()], run_check=False)
            _add(self.masters[at], local(partial.redistribute(placements=shard.placements)))
        self._head_sums.clear()

    def drop_gradients(self) -> None:
        super().drop_gradients()
        self._head_sums.clear()

    def _clipped_norm(self) -> Tensor:
        """The same number on all ranks. What several ranks hold counts once."""
        squares = torch.zeros((), dtype=torch.float64, device=self.parallel.device)
        for param, master in zip(self.params, self.masters, strict=True):
            if param.numel() and local(param).data_ptr() != master.data_ptr():
                raise RuntimeError("FSDP has moved a shard away from its optimiser")
            if not isinstance(param, DTensor):  # a critic's head, whole on every rank
                master.grad = torch.zeros_like(master) if master.grad is None else master.grad
                dist.all_reduce(master.grad, group=self.parallel.shards.get_group())
            if master.grad is not None:
                norm = torch.linalg.vector_norm(master.grad, dtype=torch.float64)
                squares += norm.square().to(squares.device) / self._holders(param)
        dist.all_reduce(squares)
        norm = squares.sqrt().float()
        scale = (self.settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for master in self.masters:
            if master.grad is not None:
                master.grad.mul_(scale.to(master.grad.device))
        return norm

    def _holders(self, param: Tensor) -> int:
        """Ranks that have the same numbers of it."""
        if not isinstance(param, DTensor):
            return self.parallel.degrees.num_ranks
        return self.parallel.degrees.num_ranks // param.device_mesh.size()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights and moments, by name: DTensors over the memory that is stepped, and whole tensors where each rank has all."""
        for name, param, master in zip(self.names, self.params, self.masters, strict=True):
            state = self.adamw.state[master]
            if not state:  # as AdamW would begin
                step = torch.zeros((), dtype=torch.float32, device=master.device)
                state |= {"step": step, "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
            for kind, tensor in (
                ("weight", master),
                ("exp_avg", state["exp_avg"]),
                ("exp_avg_sq", state["exp_avg_sq"]),
            ):
                yield f"{kind}.{name}", self.parallel.like(param, tensor)

    def set_update(self, update: int) -> None:
        """After the tensors were read: how many updates have made them."""
        self.update = update
        for master in self.masters:
            self.adamw.state[master]["step"].fill_(float(update))


def _add(master: Tensor, gradient: Tensor) -> None:
    gradient = gradient.to(master.device)
    master.grad = gradient.clone() if master.grad is None else master.grad.add_(gradient)
