"""A model of which each rank holds a shard: FSDP2, with tensor and context parallelism below it.

A rank's trainer is a `LocalTrainer` over these: the same head, losses and bookkeeping as on one device. Whatever a rank computes is
its part of a sum over all ranks, since losses are divided by global counts before they come here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sluice.data.packing import Piece
from sluice.errors import ConfigError
from sluice.trainers.attention import PackedAttention
from sluice.trainers.model import PolicyModel, check_compiler, weights_of
from sluice.trainers.split_rows import Gather, SplitAttention, padded, share_of
from sluice.trainers.tensor_parallel import divide_layer, refuse_undividable


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
class ParallelState:
    """Where a rank stands in the meshes. Neighbours divide matrices, sets of neighbours divide tokens; all hold shards of all weights."""

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
    def of(cls, rank: int, degrees: Degrees, device: torch.device) -> ParallelState:
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
        whole: PolicyModel | None,
        parallel: ParallelState,
        dtype: torch.dtype,
        *,
        with_head: bool = True,
        cpu_offload: bool = False,
    ) -> None:
        """Weights and buffers are those of the `whole` of rank 0, in RAM; elsewhere it is None. Shards have the outline's dtypes, and what
        is computed with has `dtype`. Heads and layers can be divided as `parallel` says (`check_layers`)."""
        super().__init__(outline.model)
        self.routers = outline.routers
        self.parallel, self.device, self.dtype = parallel, parallel.device, dtype
        self.layers = _layers_of(self.body)
        self.num_heads = (self.num_heads[0] // parallel.degrees.tensor, self.num_heads[1] // parallel.degrees.tensor)
        self._shard(_tensors(whole.model) if whole else None, with_head, cpu_offload)
        self.head_shards = {name: p for name, p in self.head.named_parameters() if with_head}
        """Its parameters as the optimiser knows them; those that the head itself has while it is whole are others."""

    def _shard(self, source: Mapping[str, Tensor] | None, with_head: bool, cpu_offload: bool) -> None:
        parallel = self.parallel
        settings: dict[str, Any] = {
            "mesh": parallel.shards,
            "mp_policy": MixedPrecisionPolicy(self.dtype, torch.float32, cast_forward_inputs=False),
            "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
        }
        inside = {module for layer in self.layers for module in layer.modules()}
        names = {module: path for path, module in self.model.named_modules()}
        around = [module for module in self.model.modules() if module not in inside]
        for module in around:
            module.to_empty(device=parallel.device, recurse=False)
        self.model.tie_weights()
        for module in around:
            _fill(names[module], module, source, recurse=False)
        for layer in self.layers:
            layer.to_empty(device=parallel.device)
            _fill(names[layer], layer, source, recurse=True)
            if parallel.degrees.tensor > 1:
                divide_layer(layer, parallel.tensor)
            fully_shard(layer, **settings)
        self.body = self._forward = _Trunk(self.body, self.head if with_head else None)
        fully_shard(self.body, reshard_after_forward=False, **settings)
        for module in self.body.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def compile(self) -> None:
        """Layer by layer, so that what puts weights together and shards them again stays outside."""
        check_compiler()
        for layer in self.layers:
            layer.forward = _compiled_with_gradient(layer.forward)

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
        experts: Tensor | None = None,
    ) -> Tensor:
        """[B, L] ids and positions → [B, L, H] on each of the ranks that divide the tokens."""
        group = self.parallel.context
        if group is None:
            return super().hidden_states(input_ids, position_ids, visible, cache, pieces, experts)
        shape = input_ids.shape
        if pieces is None:
            pieces = [Piece(row * shape[1], shape[1], None) for row in range(shape[0])]
        row, places, pieces = padded(input_ids.reshape(1, -1), position_ids.reshape(1, -1), pieces, group.size())
        share = super().hidden_states(share_of(row, group), share_of(places, group), pieces=pieces)
        whole: Any = Gather.apply(share, group)
        return whole[:, : shape.numel()].reshape(*shape, -1)

    def _packed_attention(self, pieces: Sequence[Piece]) -> PackedAttention:
        if self.parallel.context is None:
            return super()._packed_attention(pieces)
        return SplitAttention(pieces, *self.num_heads, self.device, self.parallel.context)

    def published(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Shards under the names, and with the numbers, that others see: in the dtype that is computed with. All ranks take part."""
        for name, tensor in tensors:
            yield name, tensor.detach().to(self.dtype) if isinstance(tensor, nn.Parameter) else tensor

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole, one after the other. All ranks take part."""
        return ((name, whole(shard)) for name, shard in self.published(weights_of(self.model)))

    @torch.no_grad()
    def take_weights(self, other: PolicyModel) -> None:
        """Shard by shard, of a model that is sharded in the same way. All ranks take part."""
        assert isinstance(other, ShardedModel)
        shards = other.published(other.model.named_parameters())
        for (_, old), (_, new) in zip(self.model.named_parameters(), shards, strict=True):
            local(old).copy_(local(new))

    def export(self) -> Callable[[str], None]:
        """As that of a model in one process, of weights and buffers under all their names: all ranks take part, and rank 0 writes."""
        state = self.model.state_dict(keep_vars=True)
        first: dict[int, str] = {}
        owners = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}
        weights = self.copied_whole(self.published((name, state[name]) for name in first.values()))
        if weights is None:
            return lambda folder: None
        weights |= {name: weights[owner] for name, owner in owners.items() if name != owner}  # what is one stays one
        return lambda folder: self.write(folder, weights)

    def copied_whole(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor] | None:
        """Into the RAM of rank 0, one after the other. All ranks take part."""
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors:
            together = whole(tensor)
            if self.parallel.rank == 0:
                copies[name] = together.to("cpu", copy=True)
        return copies if self.parallel.rank == 0 else None

    def check_base(self, folder: str) -> None:
        """Raises ConfigError for a checkpoint over weights that this model does not have; those of this one are all in it."""


def check_layers(outline: PolicyModel, degrees: Degrees) -> None:
    """Raises ConfigError for a model whose layers cannot be told apart, or not be divided so."""
    layers = _layers_of(outline.body)
    if degrees.tensor > 1:
        refuse_undividable(outline.config, layers, degrees.tensor)


def _compiled_with_gradient(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Any = torch.compile(forward, dynamic=True)
    return lambda *args, **kwargs: (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, in the same memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(shard: Tensor) -> Tensor:
    """Put together on every rank."""
    return shard.full_tensor() if isinstance(shard, DTensor) else shard


def _layers_of(body: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = [m for m in body.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"trainer.name=fsdp: {type(body).__name__} has no layers that sluice can tell apart; set trainer.name=local"
        )
    return layers


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


@torch.no_grad()
def _fill(path: str, module: nn.Module, source: Mapping[str, Tensor] | None, *, recurse: bool) -> None:
    """Weights and buffers that have memory by now, from rank 0 to all."""
    tensors = [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]
    for name, tensor in tensors:
        if source is not None:
            tensor.copy_(source[f"{path}.{name}" if path else name])
        dist.broadcast(tensor, 0)
