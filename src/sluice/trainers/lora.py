"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685, section 4.1): W + (alpha / rank) · B A, where only A and B are trained.

The layers are peft's. What is published, exported and fingerprinted are merged weights under the names that the model has without
adapters: engines know nothing of them. Unless they take adapters as such: then these are published by themselves, and what is
fingerprinted are the model's weights and theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sluice.errors import ConfigError
from sluice.trainers.model import PolicyModel, check_finite, copied, weights_of
from sluice.weights.disk import ADAPTER_FOLDER
from sluice.weights.fingerprint import fingerprint

FILE = "adapter_model.safetensors"
BASE = "base_fingerprint"
"""In that file: of the base model."""
NAME = "default"
"""Of the adapter, to peft."""


class LoraModel(PolicyModel):
    """Its base weights stay as they are."""

    def __init__(
        self, base: PolicyModel, *, rank: int, alpha: float, targets: Sequence[str], seed: int, apart: bool = False
    ) -> None:
        """`targets` are names of linear layers in the body (`q_proj`); none for all of them. `seed` draws A; B begins as 0. `apart`:
        engines take adapters as such.

        Raises ConfigError when a target is not there.
        """
        super().__init__(base.model)
        self._apart = apart
        self.routers = base.routers
        self._base_fingerprint = fingerprint(base.named_weights())
        self.settings = add_adapters(base, rank, alpha, targets, seed)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        weights = weights_of(self.model)
        return weights_apart(self.model, weights) if self._apart else self._merged(weights)

    def export(self) -> Callable[[str], None]:
        weights, write_adapter = copied(dict(self._merged(self.model.state_dict().items()))), self.export_adapter()

        def write(folder: str) -> None:
            self.write(folder, weights)
            write_adapter(folder)

        return write

    def export_adapter(self) -> Callable[[str], None]:
        adapter = copied(adapter_of(self.model))
        return lambda folder: write_adapter(folder, self.settings, adapter, self._base_fingerprint)

    @torch.no_grad()
    def load_weights(self, folder: str) -> None:
        """Take the adapter of a checkpoint, over the base that this model has. Raises ConfigError when it was made over another."""
        check_base(folder, self._base_fingerprint)
        with safe_open(Path(folder) / ADAPTER_FOLDER / FILE, "pt") as file:
            for name, tensor in adapter_of(self.model).items():
                tensor.copy_(file.get_tensor(name))

    def _merged(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        return merged(self.model, tensors, lambda layer: merged_weight(*factors(layer)))


def adapted_layers(base: PolicyModel, targets: Sequence[str]) -> list[str]:
    """By full name: the head, should it be called like one of them, is left alone. Raises ConfigError when a target is not there."""
    linear = {name.rpartition(".")[2] for name, module in base.body.named_modules() if isinstance(module, nn.Linear)}
    if unknown := sorted({*targets} - linear):
        raise ConfigError(
            f"trainer.lora_targets: {type(base.model).__name__} has no linear layer called {', '.join(unknown)}; it has "
            f"{', '.join(sorted(linear))}"
        )
    return [
        name
        for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear) and module is not base.head and name.rpartition(".")[2] in (targets or linear)
    ]


def add_adapters(base: PolicyModel, rank: int, alpha: float, targets: Sequence[str], seed: int) -> LoraConfig:
    """Into the model itself, whose own weights are not trained from then on."""
    inside = adapted_layers(base, targets)
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=inside, lora_dropout=0.0)  # pyright: ignore[reportArgumentType]
    torch.manual_seed(seed)
    inject_adapter_in_model(settings, base.model)
    base.model.eval()
    return settings


def adapter_of(model: Any) -> dict[str, Tensor]:
    """Its tensors, as peft names them in a file."""
    return {f"base_model.model.{name}": tensor for name, tensor in get_peft_model_state_dict(model).items()}


def write_adapter(folder: str, settings: LoraConfig, adapter: dict[str, Tensor], base: str) -> None:
    """`base` is the fingerprint of the model that it was made over."""
    check_finite(adapter)
    path = Path(folder) / ADAPTER_FOLDER
    path.mkdir()
    settings.save_pretrained(str(path))
    save_file(adapter, path / FILE, {"format": "pt", BASE: base})


def check_base(folder: str, base: str) -> None:
    """Raises ConfigError when the adapter of a checkpoint was made over another model."""
    with safe_open(Path(folder) / ADAPTER_FOLDER / FILE, "pt") as file:
        if file.metadata()[BASE] != base:
            raise ConfigError(
                "the model under the adapter has other weights than when the run began: those of model.path were changed; put "
                "them back, or begin a new run"
            )


def merged(
    model: nn.Module, tensors: Iterable[tuple[str, Tensor]], merge: Callable[[Any], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a model with adapters under their names without; where there is an adapter, what `merge` makes of the layer."""
    for name, tensor in tensors:
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            tensor = merge(model.get_submodule(name.removesuffix(".base_layer.weight")))
        yield name.replace(".base_layer.", "."), tensor


def weights_apart(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a model with adapters, those of the model under their names without; of each adapter A, and (alpha / rank) · B."""
    for name, tensor in tensors:
        layer, is_b, _ = name.partition(".lora_B.")
        if is_b:
            module: Any = model.get_submodule(layer)
            tensor = tensor.detach() * module.scaling[NAME]
        yield name.replace(".base_layer.", ".").replace(f".{NAME}.", "."), tensor


def factors(layer: Any) -> tuple[Tensor, Tensor, Tensor, float]:
    """W, A, B and alpha / rank."""
    return layer.base_layer.weight, layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.scaling[NAME]


@torch.no_grad()
def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + (alpha / rank) · B A, computed in FP32, in W's dtype."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling).to(weight.dtype)
