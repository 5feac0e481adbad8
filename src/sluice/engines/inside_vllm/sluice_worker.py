"""What sluice adds to vLLM's worker processes: loading published weights, and reading back those that they compute with.

It runs in vLLM's own environment, which has no sluice: the folder of this file is put on its `PYTHONPATH`, and vLLM is started
with `--worker-extension-cls sluice_worker.Weights`. Its methods are called through `/collective_rpc`.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_EXPERTS = ("w13_weight", "w2_weight")
_READ_ROWS = 1024
"""Columns of a packed weight that are computed at once."""


def _find_sluice() -> None:
    """Whatever needs torch only can be imported from there: nothing else that lies beside it is seen here."""
    package = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location(
        "sluice", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec
    assert spec.loader
    module = sys.modules["sluice"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_find_sluice()

from sluice.weights.fingerprint import parts  # noqa: E402
from sluice.weights.publication import Source  # noqa: E402


class Weights:
    """Becomes a base of vLLM's worker class. What its methods give is told as `_outcome` says."""

    _source: Source | None = None

    def sluice_ready(self) -> dict[str, Any]:
        """How many workers tensor parallelism makes, and whether these are all."""
        return _outcome(self._layout)

    def sluice_load(self, inlet: str, version: str, asked: str) -> dict[str, Any]:
        """Take over the weights of a version, which come through a `sluice.weights.publication.Stream`, pickled. Gives the parts of the
        fingerprint of what came, if it is `asked` for them."""
        return _outcome(lambda: self._load(inlet, int(version), asked == "parts"))

    def sluice_load_adapter(self, folder: str) -> dict[str, Any]:
        """Put the adapter of a folder in the place of the one that it has."""
        return _outcome(lambda: self._load_adapter(folder))

    def sluice_parts(self) -> dict[str, Any]:
        """The parts of the fingerprint that this rank has, under the names of the checkpoint. With tensor parallelism the sums of
        the ranks are to be added."""
        return _outcome(self._parts)

    def _layout(self) -> list[Any]:
        parallel: Any = self.parallel_config  # type: ignore[attr-defined]
        is_plain = parallel.pipeline_parallel_size == parallel.data_parallel_size == 1
        return [parallel.tensor_parallel_size, is_plain]

    def _load_adapter(self, folder: str) -> None:
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        manager: Any = self.model_runner.lora_manager  # type: ignore[attr-defined]
        (number,) = manager.list_adapters()
        manager.add_adapter(LoRARequest("adapter", number, folder, load_inplace=True))

    def _load(self, inlet: str, version: int, wants_parts: bool) -> list[Any]:
        source = self._source = self._source or Source()
        stream = source.inlet(inlet)
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        came: list[Any] = []

        def noted(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
            for pair in weights:
                if wants_parts:
                    came.extend(parts([pair]))
                yield pair

        try:
            weights = stream.tensors(version, runner.device, _rank())
            runner.reload_weights(weights_iterator=noted(weights))
        except BaseException:
            source.drop()
            raise
        for module in runner.get_model().modules():
            if kernel := _packing_kernel(module):
                kernel.process_weights_after_loading(module)  # which vLLM does for the first weights only
        return came

    def _parts(self) -> list[Any]:
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        own = [*checkpoint_tensors(runner.get_model(), _rank()), *adapter_tensors(runner, _rank())]
        found: list[Any] = []
        for name, tensor, shape in own:
            ((name, _, dtype, total),) = parts([(name, tensor)])
            found.append([name, shape, dtype, total])
        return found


def _outcome(work: Callable[[], Any]) -> dict[str, Any]:
    """Its value, or its error as text: of errors that are raised vLLM tells the first worker's, and takes the others' for answers to what it
    asks next."""
    try:
        return {"value": work()}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def _rank() -> int:
    """Of the tensor parallelism."""
    from vllm.distributed import get_tensor_model_parallel_rank  # pyright: ignore[reportMissingImports]

    return get_tensor_model_parallel_rank()


def checkpoint_tensors(model: nn.Module, rank: int) -> Iterator[tuple[str, Tensor, list[int]]]:
    """Name in the checkpoint, this rank's share, and the shape of the whole. A share that another rank has as well is left out."""
    packed = getattr(model, "packed_modules_mapping", {})
    for path, module in model.named_modules():
        path = path.removesuffix(".base_layer")  # under an adapter
        for kind, weight in module.named_parameters(recurse=False):
            if hasattr(module, "global_num_experts"):
                if kind in _EXPERTS:  # else it is the router's
                    yield from _experts(path.removesuffix("routed_experts"), module, unpacked(module, weight), kind)
                continue
            ranks: Any = getattr(module, "tp_size", 1)
            if ranks == 1 and rank > 0:
                continue
            weight = read_back(module, weight) if kind == "weight" and not weight.numel() else weight
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


def adapter_tensors(runner: Any, rank: int) -> Iterator[tuple[str, Tensor, list[int]]]:
    """As `checkpoint_tensors`, of the adapter that is computed with: A, and B with its scale; none where there is none."""
    if not runner.lora_config:
        return
    manager: Any = runner.lora_manager._adapter_manager
    number = next((number for number in manager.lora_index_to_id if number is not None), None)
    if number is None:
        return
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
    first = config.moe_parallel_config.ep_rank * len(weight)
    inner = config.intermediate_size_per_partition_unpadded * config.moe_parallel_config.tp_size
    hidden = config.hidden_dim_unpadded
    for number, own in enumerate(weight, first):
        if kind == "w13_weight":
            gate, up = own.chunk(2)
            yield f"{path}{number}.gate_proj.weight", gate, [inner, hidden]
            yield f"{path}{number}.up_proj.weight", up, [inner, hidden]
        else:
            yield f"{path}{number}.down_proj.weight", own, [hidden, inner]


def _packing_kernel(module: nn.Module) -> Any:
    """What has put a layer's experts into an order of its own, as vLLM does for CPUs; else None."""
    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    experts: Any = getattr(kernel, "fused_experts", None)
    return experts if hasattr(experts, "isa") and not experts._use_zentorch else None


def unpacked(module: nn.Module, weight: Tensor) -> Tensor:
    """The weights of experts in their own order. Where each number went is seen from numbers that are put into order in the same way,
    digit by digit, since BF16 has whole ones up to 256 only."""
    kernel = _packing_kernel(module)
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
    """A weight that vLLM has packed away for its CPU kernels, from what the layer makes of unit vectors: each product is one
    number of the weight times 1, and all others times 0."""
    width = module.input_size_per_partition if hasattr(module, "input_size_per_partition") else module.input_size
    columns = [
        module.cpu_linear(rows, weight, None).t()
        for rows in torch.eye(width, dtype=weight.dtype, device=weight.device).split(_READ_ROWS)
    ]
    return torch.cat(columns, dim=1).contiguous()
