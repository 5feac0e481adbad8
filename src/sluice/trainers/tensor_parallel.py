"""Tensor parallelism by DTensor plans: the matrices of a layer are divided over ranks, and the layer's output is summed over them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sluice.errors import ConfigError

BY_OUTPUT = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
BY_INPUT = {"o_proj", "down_proj"}
PER_HEAD = {"q_norm", "k_norm"}
"""Norms of single heads: each rank applies them to its own heads, so that the gradients of all ranks add up."""


def divide_layer(layer: nn.Module, mesh: DeviceMesh) -> None:
    """Each rank of the mesh keeps its share of the matrices; norms stay whole, and of an adapter's two factors the one that only has the
    rank and what is not divided. The layer was looked at, without adapters, by `refuse_undividable`."""
    plan = {}
    for path, module in layer.named_modules():
        names = set(path.split("."))
        by_output = not names.isdisjoint(BY_OUTPUT)
        if isinstance(module, nn.Linear) and ("lora_A" if by_output else "lora_B") not in names:
            plan[path] = ColwiseParallel() if by_output else RowwiseParallel()
    parallelize_module(layer, mesh, plan, src_data_rank=None)


def refuse_undividable(config: Any, layers: list[nn.Module], size: int) -> None:
    """Raises ConfigError for an architecture whose layers a plan of `size` ranks does not fit. `config` is of `transformers`."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for path, module in (pair for layer in layers for pair in layer.named_modules()):
        name = path.rpartition(".")[2]
        own = list(module.parameters(recurse=False))
        known = isinstance(module, nn.Linear) and name in BY_OUTPUT | BY_INPUT
        norm = all(p.dim() == 1 for p in own) and not isinstance(module, nn.Linear)
        if name in PER_HEAD and own and own[0].shape[0] != head_size:
            norm = False
        if not (known or norm):
            raise ConfigError(
                f"trainer.tensor_parallel={size}: there is no plan for {type(module).__name__} `{path}` of a "
                f"{type(layers[0]).__name__} (layers like Llama's, Mistral's or Qwen's have one); set trainer.tensor_parallel=1"
            )
    if config.intermediate_size % size:
        raise ConfigError(
            f"trainer.tensor_parallel={size} does not divide the model's intermediate size {config.intermediate_size}"
        )
