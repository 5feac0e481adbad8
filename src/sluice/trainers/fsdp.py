"""A model and its optimiser of which each rank holds a shard: FSDP2, with tensor and context parallelism below it.

A rank's trainer is a `LocalTrainer` over these: the same head, losses and bookkeeping as on one device. Whatever a rank computes is
its part of a sum over all ranks, since losses are divided by global counts before they come here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial

from sluice.data.packing import Piece
from sluice.errors import ConfigError
from sluice.trainers.attention import PackedAttention
from sluice.trainers.model import PolicyModel
from sluice.trainers.optim import Optimizer, OptimizerSettings
from sluice.trainers.split_rows import Gather, SplitAttention, padded, share_of
from sluice.trainers.tensor_parallel import PER_HEAD, divide_layer, refuse_undividable


@dataclass(frozen=True)
class Degrees:
    """How many ranks there are, and how many of them share what."""

    num_ranks: int
    tensor: int
    """Ranks that divide each layer's matrices."""
    context: int
    """Ranks that divide the tokens of a micro-batch."""

    @property
    def data(self) -> int:
        """Ranks, or sets of ranks, that have micro-batches of their own."""
        return self.num_ranks // (self.tensor * self.context)

    def data_rank(self, rank: int) -> int:
        return rank // (self.tensor * self.context)

    def speaks(self, rank: int) -> bool:
        """Whether it is the first of those that have the same micro-batches, whose results are all the same."""
        return rank % (self.tensor * self.context) == 0


@dataclass(frozen=True)
class Place:
    """Of a rank among all. Neighbours divide matrices, sets of neighbours divide tokens; all hold shards of all weights."""

    rank: int
    degrees: Degrees
    device: torch.device
    mesh: DeviceMesh
    """Of "shards", the ranks that each weight (with tensor parallelism: share of a weight) is sharded over, and "tensor"."""
    mesh_of_files: DeviceMesh
    """The same for tensors in RAM."""
    context: dist.ProcessGroup | None
    """None where a row is not divided."""
    words: dist.ProcessGroup
    """All ranks, for what is no tensor."""
    files: dist.ProcessGroup
    """All ranks, for what a thread writes while training goes on."""

    @classmethod
    def of(cls, rank: int, degrees: Degrees, device: torch.device) -> Place:
        """Of this process, whose process group has been made."""
        shape, names = (degrees.num_ranks // degrees.tensor, degrees.tensor), ("shards", "tensor")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        mesh_of_files = mesh if device.type == "cpu" else init_device_mesh("cpu", shape, mesh_dim_names=names)
        context = None
        if degrees.context > 1:
            for row in mesh.mesh.T.reshape(degrees.tensor * degrees.data, degrees.context).tolist():
                group = dist.new_group(row)  # every rank takes part in making every group
                context = group if rank in row else context
        words, files = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
        return cls(rank, degrees, device, mesh, mesh_of_files, context, words, files)  # pyright: ignore[reportArgumentType]

    @property
    def shards(self) -> DeviceMesh:
        return self.mesh["shards"]

    @property
    def tensor(self) -> DeviceMesh:
        return self.mesh["tensor"]

    def like(self, param: Tensor, shard: Tensor) -> Tensor:
        """A shard, in whatever memory, as a tensor that is sharded as `param` is."""
        if not isinstance(param, DTensor):
            return shard
        mesh = self.mesh_of_files if shard.device.type == "cpu" else self.mesh
        mesh = mesh if param.device_mesh.ndim == 2 else mesh["shards"]
        return DTensor.from_local(
            shard, mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )

    @property
    def repeats_head(self) -> bool:
        """Whether another rank has the same tokens before the head: then that one's gradient counts."""
        return self.context is not None and self.context.rank() > 0


class _Trunk(nn.Module):
    """What is sharded as a whole, around the layers: embeddings, last norm, and the head where it is used. They are put together when the
    forward begins, and stay so until the backward ends or `reshard` is called; in between the head is applied."""

    def __init__(self, body: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, **inputs: Any) -> Any:
        return self.body(**inputs)


class ShardedModel(PolicyModel):
    """A model that was made on no device; each rank materialises layer after layer and keeps its shard."""

    def __init__(
        self,
        outline: PolicyModel,
        source: Mapping[str, Tensor] | None,
        place: Place,
        dtype: torch.dtype,
        *,
        with_head: bool = True,
        cpu_offload: bool = False,
    ) -> None:
        """Whole weights and buffers by name are in the `source` of rank 0, and None elsewhere. Shards have the outline's dtype, and what
        is computed with has `dtype`. The heads can be divided as `place` says. Raises ConfigError for layers that cannot."""
        super().__init__(outline.model)
        self.place, self.device, self.dtype = place, place.device, dtype
        check_layers(outline, place.degrees)
        self.layers = _layers_of(self.body)
        self.num_heads = (self.num_heads[0] // place.degrees.tensor, self.num_heads[1] // place.degrees.tensor)
        self._shard(source, with_head, cpu_offload)
        self.head_shards = {name: p for name, p in self.head.named_parameters() if with_head}
        """Its parameters as the optimiser knows them; those that the head itself has while it is whole are others."""

    def _shard(self, source: Mapping[str, Tensor] | None, with_head: bool, cpu_offload: bool) -> None:
        place = self.place
        param_dtype = None if self.model.dtype == self.dtype else self.dtype
        settings: dict[str, Any] = {
            "mesh": place.shards,
            "mp_policy": MixedPrecisionPolicy(param_dtype, torch.float32, cast_forward_inputs=False),
            "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
        }
        inside = {module for layer in self.layers for module in layer.modules()}
        names = {module: path for path, module in self.model.named_modules()}
        around = [module for module in self.model.modules() if module not in inside]
        for module in around:
            module.to_empty(device=place.device, recurse=False)
        self.model.tie_weights()
        for module in around:
            _fill(names[module], module, source, recurse=False)
        for layer in self.layers:
            layer.to_empty(device=place.device)
            _fill(names[layer], layer, source, recurse=True)
            if place.degrees.tensor > 1:
                divide_layer(layer, place.tensor)
            fully_shard(layer, **settings)
        self.body = self._forward = _Trunk(self.body, self.head if with_head else None)
        fully_shard(self.body, reshard_after_forward=False, **settings)
        for module in self.body.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def reshard(self) -> None:
        """After a forward that no backward follows."""
        assert isinstance(self.body, FSDPModule)
        self.body.reshard()

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        visible: Tensor | None = None,
        cache: Any = None,
        pieces: Sequence[Piece] | None = None,
    ) -> Tensor:
        """[B, L] ids and positions → [B, L, H] on each of the ranks that divide the tokens."""
        group = self.place.context
        if group is None:
            return super().hidden_states(input_ids, position_ids, visible, cache, pieces)
        shape = input_ids.shape
        if pieces is None:
            pieces = [Piece(row * shape[1], shape[1], None) for row in range(shape[0])]
        row, places, pieces = padded(input_ids.reshape(1, -1), position_ids.reshape(1, -1), pieces, group.size())
        share = super().hidden_states(share_of(row, group), share_of(places, group), pieces=pieces)
        whole: Any = Gather.apply(share, group)
        return whole[:, : shape.numel()].reshape(*shape, -1)

    def _packed_attention(self, pieces: Sequence[Piece]) -> PackedAttention:
        if self.place.context is None:
            return super()._packed_attention(pieces)
        return SplitAttention(pieces, *self.num_heads, self.device, self.place.context)

    def named_weights(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Whole, one after the other, or those of some names, in the dtype that they are computed with. All ranks take part."""
        for name, param in self.model.named_parameters():
            if names is None or name in names:
                yield name, whole(param.detach(), self.dtype)

    @torch.no_grad()
    def take_weights(self, other: PolicyModel) -> None:
        """Shard by shard, of a model that is sharded in the same way."""
        for old, new in zip(self.model.parameters(), other.model.parameters(), strict=True):
            local(old).copy_(local(new))


class ShardedOptimizer(Optimizer):
    """Steps this rank's shards, plain tensors that share their memory with the sharded weights, and clips by the norm over all ranks."""

    def __init__(
        self,
        module: nn.Module,
        settings: OptimizerSettings,
        num_updates: int,
        owner: str = "policy",
        *,
        place: Place,
        model: ShardedModel | None = None,
    ) -> None:
        """`model` is the one whose head has its gradient from `gradient_of`."""
        self.place = place
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
            if own is param:
                sums = self._head_sums[name] = torch.zeros(own.shape, dtype=torch.float32, device=own.device)
                return None if self.place.repeats_head else sums
        return None

    def collect_gradients(self) -> None:
        """After each backward, on all ranks: what FSDP has reduced, and what it does not know of."""
        for param, master, per_head in zip(self.params, self.masters, self._per_head, strict=True):
            if param.grad is None:
                continue
            gradient = local(param.grad).float()
            param.grad = None
            if per_head and self.place.degrees.tensor > 1:
                dist.all_reduce(gradient, group=self.place.tensor.get_group())
            if not isinstance(param, DTensor) and self.place.repeats_head:
                gradient.zero_()
            _add(master, gradient)
        for name, sums in self._head_sums.items():
            assert self._head is not None
            shard = self._head.head_shards[name]
            at = next(i for i, p in enumerate(self.params) if p is shard)
            assert isinstance(shard, DTensor)
            partial = DTensor.from_local(sums, self.place.shards, [Partial()], run_check=False)
            _add(self.masters[at], local(partial.redistribute(placements=shard.placements)))
        self._head_sums.clear()

    def drop_gradients(self) -> None:
        super().drop_gradients()
        self._head_sums.clear()

    def _clipped_norm(self) -> Tensor:
        """The same number on all ranks. What several ranks hold counts once."""
        squares = torch.zeros((), dtype=torch.float64, device=self.place.device)
        for param, master in zip(self.params, self.masters, strict=True):
            if param.numel() and local(param).data_ptr() != master.data_ptr():
                raise RuntimeError("FSDP has moved a shard away from its optimiser")
            if not isinstance(param, DTensor):  # a critic's head, whole on every rank
                master.grad = torch.zeros_like(master) if master.grad is None else master.grad
                dist.all_reduce(master.grad, group=self.place.shards.get_group())
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
            return self.place.degrees.num_ranks
        return self.place.degrees.num_ranks // param.device_mesh.size()

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
                yield f"{kind}.{name}", self.place.like(param, tensor)

    def set_update(self, update: int) -> None:
        """After the tensors were read: how many updates have made them."""
        self.update = update
        for master in self.masters:
            self.adamw.state[master]["step"].fill_(float(update))


def check_layers(outline: PolicyModel, degrees: Degrees) -> None:
    """Raises ConfigError for a model whose layers cannot be told apart, or not be divided so."""
    layers = _layers_of(outline.body)
    if degrees.tensor > 1:
        refuse_undividable(outline.config, layers, degrees.tensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, in the same memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Put together on every rank; cast before it travels."""
    param = param.to(dtype)
    return param.full_tensor() if isinstance(param, DTensor) else param


def _add(master: Tensor, gradient: Tensor) -> None:
    gradient = gradient.to(master.device)
    master.grad = gradient.clone() if master.grad is None else master.grad.add_(gradient)


def _layers_of(body: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = [m for m in body.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"trainer.name=fsdp: {type(body).__name__} has no layers that sluice can tell apart; set trainer.name=local"
        )
    return layers


@torch.no_grad()
def _fill(path: str, module: nn.Module, source: Mapping[str, Tensor] | None, *, recurse: bool) -> None:
    """Weights and buffers that have memory by now, from rank 0 to all."""
    tensors = [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]
    for name, tensor in tensors:
        if source is not None:
            tensor.copy_(source[f"{path}.{name}" if path else name])
        dist.broadcast(tensor, 0)
