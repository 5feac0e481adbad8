"""The weights that vLLM's model has, under the names of the checkpoint: with what they are computed with, or as shapes alone.

Its workers read this file, in an environment that has torch and vLLM and no sluice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sluice.errors import EngineError
from sluice.weights.fingerprint import one_by_one

_EXPERTS = ("w13_weight", "w2_weight")
_READ_ROWS = 1024
"""Columns of a packed weight that are computed at once."""
Shapes = dict[str, list[int]]
"""By name in the checkpoint, with each expert for itself."""


def shapes_of(model: nn.Module) -> Shapes:
    """Of all that it wants to be given, on whatever rank."""
    return _whole((name, shape) for name, _, shape in checkpoint_tensors(model, 0, outline))


def misfit(held: Shapes, coming: Iterable[tuple[str, Iterable[int]]]) -> tuple[str, bool]:
    """How the weights that come are others than those of a server's model, if they are; and whether it is certain that they are another
    model's. It is not where each has names that the other has not: a server may have other names for the same weights."""
    given = _whole((name, list(shape)) for name, shape in coming)
    other = [
        f"{name} is {held[name]} there, and {shape} comes"
        for name, shape in given.items()
        if sorted(held.get(name, shape)) != sorted(shape)  # a server may want a matrix the other way round, as of GPT-2
    ]
    missing = [f"no {name} comes, which is {shape} there" for name, shape in held.items() if name not in given]
    unknown = [f"{name} comes, {shape}, and there is none there" for name, shape in given.items() if name not in held]
    found = [*other, *unknown, *missing]
    if not found:
        return "", False
    more = f" (and {len(found) - 1} more that do not fit)" if len(found) > 1 else ""
    text = f"the server's model is not the trainer's: {found[0]}{more}; start the server with the model of model.path"
    return text, bool(other) or not (missing and unknown)


def _whole(shapes: Iterable[tuple[str, list[int]]]) -> Shapes:
    empty = ((name, torch.empty(shape, device="meta")) for name, shape in shapes)
    return {name: list(tensor.shape) for name, tensor in one_by_one(empty)}


def computed_with(module: Any, kind: str, weight: Tensor, as_head: bool) -> Tensor:
    """On a CPU another tensor than the one that the layer shows, if it shows one."""
    if hasattr(module, "global_num_experts"):
        return unpacked(module, weight)
    if kind == "weight" and hasattr(module, "cpu_linear") and (as_head or not hasattr(module, "org_vocab_size")):
        return read_back(module, weight)
    return weight


def outline(module: Any, kind: str, weight: Tensor, as_head: bool) -> Tensor:
    """Of the shape that `computed_with` gives (of experts: of all ranks' together), without numbers."""
    shape = list(weight.shape)
    if hasattr(module, "global_num_experts"):
        shape = [module.global_num_experts, *shape[1:]]
    elif not weight.numel():
        shape = [getattr(module, "output_size_per_partition", None) or module.output_size, _width(module)]
    return torch.empty(shape, dtype=weight.dtype, device="meta")


Look = Callable[[Any, str, Tensor, bool], Tensor]


def checkpoint_tensors(
    model: nn.Module, rank: int, look: Look = computed_with
) -> Iterator[tuple[str, Tensor, list[int]]]:
    """Name in the checkpoint, this rank's share, and the shape of the whole. A share that another rank has as well is left out."""
    packed = getattr(model, "packed_modules_mapping", {})
    seen: set[int] = set()
    for path, module, as_head in _layers(model):
        path = path.removesuffix(".base_layer")  # under an adapter
        for kind, shown in module.named_parameters(recurse=False):
            if hasattr(module, "global_num_experts"):
                if kind in _EXPERTS:  # else it is the router's
                    yield from _experts(
                        path.removesuffix("routed_experts"), module, look(module, kind, shown, as_head), kind
                    )
                continue
            ranks: Any = getattr(module, "tp_size", 1)
            if ranks == 1 and rank > 0:
                continue
            weight = look(module, kind, shown, as_head)
            if id(shown) in seen and (weight.is_meta or torch.equal(weight, shown)):
                continue  # a head that has the matrix of the embeddings, and computes with it
            seen.add(id(shown))
            parent, _, own = path.rpartition(".")
            if own in packed:
                for part, (rows, copies) in zip(packed[own], _rows_of_parts(module), strict=True):
                    share, weight = weight[:rows], weight[rows:]
                    if rank % copies == 0:
                        yield f"{parent}.{part}.{kind}", share, [rows * ranks // copies, *share.shape[1:]]
                continue
            shape = list(weight.shape)
            dim = _sharded_dim(module, kind)
            if hasattr(module, "org_vocab_size"):  # its last rows are padding
                shard: Any = module.shard_indices
                weight = weight[: shard.org_vocab_end_index - shard.org_vocab_start_index]
                shape = [module.org_vocab_size, *shape[1:]]
            elif dim is not None:
                shape[dim] *= ranks
            elif rank > 0:  # as the bias behind split rows
                continue
            yield f"{path}.{kind}" if path else kind, weight, shape


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """With their names, and whether logits are made by them. Embeddings that are the head as well come again, as that."""
    layers = [(path, module, is_head(module)) for path, module in model.named_modules()]
    yield from layers
    if not any(as_head for *_, as_head in layers):
        yield from (("lm_head", module, True) for _, module, _ in layers if hasattr(module, "org_vocab_size"))


def adapter_tensors(manager: Any, number: int, rank: int) -> Iterator[tuple[str, Tensor, list[int]]]:
    """As `checkpoint_tensors`, of an adapter: A, and B with its scale."""
    if number not in manager.lora_index_to_id:
        raise EngineError(f"the server does not compute with adapter {number}: something else has taken its place")
    index, adapter = manager.lora_index_to_id.index(number), manager.get_adapter(number)
    for path, module in manager.modules.items():
        held = manager._get_lora_layer_weights(adapter, path)
        if held is None:
            continue
        base, (parent, _, own) = module.base_layer, path.rpartition(".")
        names = manager.packed_modules_mapping.get(own, [own])
        copies_of_parts = [copies for _, copies in _rows_of_parts(base)] if len(names) > 1 else [1]
        for k, (name, copies) in enumerate(zip(names, copies_of_parts, strict=True)):
            if len(names) > 1 and held.lora_a[k] is None:
                continue
            a = module.lora_a_stacked[k][index, 0, : held.rank]
            b = module.lora_b_stacked[k][index, 0, :, : held.rank]
            for kind, tensor, dim, copies_of in (("lora_A", a, 1, 1), ("lora_B", b, 0, copies)):
                shape, is_sharded = list(tensor.shape), _sharded_dim(base, "weight") == dim
                if is_sharded:
                    shape[dim] = shape[dim] * base.tp_size // copies_of
                if rank % copies_of == 0 if is_sharded else rank == 0:
                    yield f"{parent}.{name}.{kind}.weight", tensor, shape


def _experts(path: str, module: Any, weight: Tensor, kind: str) -> Iterator[tuple[str, Tensor, list[int]]]:
    """Of a layer's experts, one by one: ranks have shares of every one, or some of their own. Padding adds nothing to a sum, and is not in
    the shape of the whole."""
    config: Any = module.moe_config
    first = config.moe_parallel_config.ep_rank * len(weight) % module.global_num_experts
    inner = config.intermediate_size_per_partition_unpadded * config.moe_parallel_config.tp_size
    hidden = config.hidden_dim_unpadded
    for number, own in enumerate(weight, first):
        if kind == "w13_weight":
            gate, up = own.chunk(2)
            yield f"{path}{number}.gate_proj.weight", gate, [inner, hidden]
            yield f"{path}{number}.up_proj.weight", up, [inner, hidden]
        else:
            yield f"{path}{number}.down_proj.weight", own, [hidden, inner]


def packing_kernel(module: nn.Module) -> Any:
    """What has put a layer's experts into an order of its own, as vLLM does for CPUs; else None."""
    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    experts: Any = getattr(kernel, "fused_experts", None)
    return experts if hasattr(experts, "isa") and not experts._use_zentorch else None


def unpacked(module: nn.Module, weight: Tensor) -> Tensor:
    """The weights of experts in their own order. Where each number went is seen from numbers that are put into order in the same way,
    digit by digit, since BF16 has whole ones up to 256 only."""
    kernel = packing_kernel(module)
    if kernel is None:
        return weight
    from vllm._custom_ops import cpu_prepack_moe_weight  # pyright: ignore[reportMissingImports]

    numbers = torch.arange(weight[0].numel()).view_as(weight[:1])
    places = torch.zeros_like(numbers)
    for shift in range(0, int(numbers.max()).bit_length(), 8):
        digits = (numbers >> shift & 255).to(weight.dtype)
        places += cpu_prepack_moe_weight(digits, kernel.isa).long() << shift
    whole = torch.empty_like(weight)
    whole.flatten(1)[:, places.flatten()] = weight.flatten(1)
    return whole


def _rows_of_parts(module: Any) -> list[tuple[int, int]]:
    """Of the matrices that are stacked in one: rows on this rank, and how many ranks have the same ones."""
    if hasattr(module, "num_kv_head_replicas"):
        copies = module.num_kv_head_replicas
        sizes = (module.head_size, module.v_head_size)
        return [(module.num_heads * sizes[0], 1), *((module.num_kv_heads * size, copies) for size in sizes)]
    return [(size // module.tp_size, 1) for size in module.output_sizes]


def _sharded_dim(module: Any, kind: str) -> int | None:
    names = {cls.__name__ for cls in type(module).__mro__}
    if "ColumnParallelLinear" in names:
        return 0
    return 1 if "RowParallelLinear" in names and kind == "weight" else None


def read_back(module: Any, weight: Tensor) -> Tensor:
    """A weight that vLLM has packed for its CPU kernels, from what the layer makes of unit vectors: each product is one
    number of the weight times 1, and all others times 0."""
    columns = [
        module.cpu_linear(rows, weight, None).t()
        for rows in torch.eye(_width(module), dtype=weight.dtype, device=weight.device).split(_READ_ROWS)
    ]
    return torch.cat(columns, dim=1).contiguous()


def _width(module: Any) -> int:
    """Of what a layer is given, on this rank."""
    return getattr(module, "input_size_per_partition", None) or module.input_size


def is_head(module: Any) -> bool:
    return any(cls.__name__ == "ParallelLMHead" for cls in type(module).__mro__)
