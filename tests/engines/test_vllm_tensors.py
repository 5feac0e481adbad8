"""What vLLM's layers are read as, by layers that hold weights as its own do on a CPU. Real ones are asked in `test_server_weights.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sluice.engines.vllm_tensors import checkpoint_tensors, misfit, shapes_of
from sluice.weights.fingerprint import fingerprint

VOCABULARY, WIDTH, PADDING = 10, 6, 2


class VocabParallelEmbedding(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.org_vocab_size, self.input_size = weight, VOCABULARY, WIDTH
        self.shard_indices = SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=VOCABULARY)
        self.pack()

    def pack(self) -> None:
        packed = self.weight.detach().clone()
        self.cpu_linear: Any = lambda rows, weight, bias: rows @ packed.t()


class ParallelLMHead(VocabParallelEmbedding):
    pass


class ColumnParallelLinear(nn.Module):
    """Whose weight is nowhere but in its kernel."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0))
        self.output_size_per_partition, self.input_size_per_partition = weight.shape
        self.tp_size = 1
        self.cpu_linear: Any = lambda rows, _, bias: rows @ weight.t()


def random(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def vllms_model(tied: bool) -> Any:
    model: Any = nn.Module()
    model.embed_tokens = VocabParallelEmbedding(random(VOCABULARY + PADDING, WIDTH))
    model.up_proj = ColumnParallelLinear(torch.randn(8, WIDTH))
    model.lm_head = ParallelLMHead(model.embed_tokens.weight if tied else random(VOCABULARY + PADDING, WIDTH))
    return model


def read(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor, _ in checkpoint_tensors(model, 0)}


def test_a_head_is_read_from_what_it_computes_with():
    model = vllms_model(tied=False)
    before = read(model)
    assert torch.equal(before["lm_head.weight"], model.lm_head.weight[:VOCABULARY])
    packed = model.lm_head.weight.detach().clone()
    packed[3, 2] += 1
    model.lm_head.cpu_linear = lambda rows, weight, bias: rows @ packed.t()
    assert fingerprint(read(model).items()) != fingerprint(before.items())


def test_a_head_with_the_matrix_of_the_embeddings_is_read_once_unless_it_computes_with_another():
    model = vllms_model(tied=True)
    assert list(read(model)) == ["embed_tokens.weight", "up_proj.weight"]
    with torch.no_grad():
        model.embed_tokens.weight += 1
    assert list(read(model)) == ["embed_tokens.weight", "up_proj.weight", "lm_head.weight"]
    model.lm_head.pack()
    assert list(read(model)) == ["embed_tokens.weight", "up_proj.weight"]


def test_embeddings_that_are_the_head_as_well_are_read_as_both():
    model = vllms_model(tied=True)
    del model.lm_head
    assert list(read(model)) == ["embed_tokens.weight", "up_proj.weight"]
    with torch.no_grad():
        model.embed_tokens.weight += 1
    assert list(read(model)) == ["embed_tokens.weight", "up_proj.weight", "lm_head.weight"]


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_are_known_without_reading(tied: bool):
    model = vllms_model(tied)
    read_shapes = {name: shape for name, _, shape in checkpoint_tensors(model, 0)}
    model.up_proj.cpu_linear = model.lm_head.cpu_linear = None
    assert shapes_of(model) == read_shapes
    assert read_shapes["up_proj.weight"] == [8, WIDTH]


HELD = {"a": [2, 3], "b": [4]}


@pytest.mark.parametrize(
    ("coming", "found", "is_certain"),
    [
        (HELD, "", False),
        ({"a": [3, 2], "b": [4]}, "", False),
        ({"a": [2, 3], "b": [5]}, "b is [4] there, and [5] comes", True),
        ({"a": [2, 3]}, "no b comes, which is [4] there", True),
        (HELD | {"c": [1], "d": [1]}, r"c comes, [1], and there is none there (and 1 more that do not fit)", True),
        ({"a": [2, 3], "c": [4]}, "c comes, [4], and there is none there (and 1 more", False),
    ],
)
def test_what_does_not_fit_is_named(coming: dict[str, list[int]], found: str, is_certain: bool):
    """Where each has names that the other has not, they may be other names for the same."""
    text, certain = misfit(HELD, coming.items())
    assert found in text
    assert certain == is_certain


def test_experts_are_compared_one_by_one():
    held = {f"mlp.experts.{k}.{name}_proj.weight": [4, 6] for k in range(2) for name in ("gate", "up")}
    assert misfit(held, [("mlp.experts.gate_up_proj", [2, 8, 6])]) == ("", False)
    assert (
        "mlp.experts.0.gate_proj.weight is [4, 6] there, and [5, 6] comes"
        in misfit(held, [("mlp.experts.gate_up_proj", [2, 10, 6])])[0]
    )
