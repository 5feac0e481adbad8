"""A fingerprint is equal for equal weights, on whatever device and in whatever order, and for no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from models import MIXTURES, tiny_model
from sluice.trainers.model import weights_of
from sluice.weights.disk import tensors_of
from sluice.weights.fingerprint import fingerprint

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8]


def some(dtype: torch.dtype, length: int) -> torch.Tensor:
    return torch.arange(1, length + 1).to(dtype)


@given(length=st.integers(1, 40), place=st.integers(0, 39), dtype=st.sampled_from(DTYPES))
def test_every_single_value_counts(length: int, place: int, dtype: torch.dtype):
    """Those beyond the last eight whole bytes, too."""
    tensor = some(dtype, length)
    before = fingerprint([("a", tensor)])
    assert fingerprint([("a", tensor.clone())]) == before
    tensor[place % length] += 1
    assert fingerprint([("a", tensor)]) != before


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_a_tensor_lies_in_memory_does_not_count(dtype: torch.dtype):
    whole = some(dtype, 64).view(8, 8)
    for tensor in (whole.t(), whole[:, 1:6], whole.flatten()[3:], whole[1:, ::2]):
        assert fingerprint([("a", tensor)]) == fingerprint([("a", tensor.contiguous().clone())])


def test_names_shapes_and_dtypes_count_and_order_does_not():
    a, b = some(torch.float32, 6), some(torch.float32, 4)
    one = fingerprint([("a", a), ("b", b)])
    assert fingerprint(iter([("b", b), ("a", a)])) == one
    others = [("b", a), ("a", b)], [("a", a)], [("a", a.view(2, 3)), ("b", b)], [("a", a.bfloat16()), ("b", b)], []
    assert len({one, *map(fingerprint, others)}) == 1 + len(others)
    assert len(one) == 16


def test_a_tied_head_is_read_once_and_an_update_shows():
    model = tiny_model("gemma2")
    names = [name for name, _ in model.named_weights()]
    assert len(names) == len(set(names))
    before = fingerprint(model.named_weights())
    assert before == fingerprint(tiny_model("gemma2").named_weights())
    with torch.no_grad():
        next(iter(model.named_weights()))[1][0, 0] += 1e-3
    assert before != fingerprint(model.named_weights())


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_are_one_by_one_in_files_and_together_where_they_compute(architecture: str, tmp_path: Path):
    """More than ten, so that their names are not in the order of their numbers."""
    config = MIXTURES[architecture]()
    names = {"mixtral": "num_local_experts", "glm4_moe": "n_routed_experts"}
    config.update({names.get(architecture, "num_experts"): 12})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    before = fingerprint(weights_of(model))
    assert fingerprint(tensors_of(tmp_path)) == before
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[7, 3, 2] += 1
    model.save_pretrained(tmp_path)
    now = fingerprint(tensors_of(tmp_path))
    assert now == fingerprint(weights_of(model)) != before
    with torch.no_grad():
        experts = model.model.layers[1].mlp.experts
        experts.down_proj.copy_(experts.down_proj.flip(0))
    assert fingerprint(weights_of(model)) != now, "experts in each other's places"
    with torch.no_grad():
        experts.down_proj.copy_(experts.down_proj.flip(0))
        gate, up = experts.gate_up_proj.chunk(2, 1)
        experts.gate_up_proj.copy_(torch.cat([up, gate], 1))
    assert fingerprint(weights_of(model)) != now, "gate and up exchanged"
