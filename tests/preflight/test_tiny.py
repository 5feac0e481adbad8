"""The tiny copy of a trial, for each architecture, and what is counted of a model without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

from models import CONFIGS, tiny_model
from sluice.errors import ConfigError
from sluice.preflight.folder import count_parameters, read_folder
from sluice.preflight.tiny import shrink
from sluice.trainers.model import PolicyModel, weights_of

LARGE = {
    "vocab_size": 1000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}


def large(architecture: str) -> Any:
    """The config of the tests' models, but as large as a real one."""
    config = CONFIGS[architecture]()
    if architecture == "gpt2":
        config.update({"n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 1000, "n_positions": 1024})
    else:
        config.layer_types = ([*(getattr(config, "layer_types", None) or [])] * 12)[:12] or None
        config.update(LARGE)
    return config


def made(config: Any) -> Any:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_tiny_copy_is_tiny_and_of_the_same_kind(architecture: str, tmp_path: Path):
    """And is one that sluice can train: `check` compares it with the model's own forward."""
    large(architecture).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    kinds, positions = set(getattr(config, "layer_types", None) or ()), config.max_position_embeddings
    shrink(config)
    config.save_pretrained(tmp_path)
    own = AutoConfig.from_pretrained(tmp_path)
    attention = "eager" if getattr(own, "attn_logit_softcapping", None) else "sdpa"
    model = AutoModelForCausalLM.from_config(own, attn_implementation=attention)
    PolicyModel(model).check()
    assert model.num_parameters() < 110_000 + (1024 * 32 if architecture == "gpt2" else 0)
    assert (own.vocab_size, own.max_position_embeddings) == (1000, positions)
    assert set(getattr(own, "layer_types", None) or ()) == kinds


def test_a_mixture_of_experts_shrinks_too():
    config = Qwen3MoeConfig(**LARGE, num_experts=128, moe_intermediate_size=768, num_experts_per_tok=8)
    shrink(config)
    assert made(config).num_parameters() < 200_000


def test_a_config_that_stays_large_is_refused():
    """One whose size lies in a key that nobody knows."""

    class Odd(SimpleNamespace):
        num_hidden_layers = property(lambda self: 3000, lambda self, value: None)

    sizes = {name: value for name, value in LARGE.items() if name != "num_hidden_layers"}
    with pytest.raises(ConfigError, match=r"its config cannot be made small: 18,.* parameters are left"):
        shrink(Odd(**sizes, model_type="odd", tie_word_embeddings=False))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_parameters_are_counted_from_a_config(architecture: str):
    config = large(architecture)
    assert count_parameters(config) == pytest.approx(made(config).num_parameters(), rel=0.01)


def test_parameters_of_experts_are_counted_from_a_config():
    config = Qwen3MoeConfig(**LARGE, num_experts=16, moe_intermediate_size=768, num_experts_per_tok=8)
    assert count_parameters(config) == pytest.approx(made(config).num_parameters(), rel=0.01)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_parameters_are_counted_in_files(architecture: str, tmp_path: Path):
    """In one file, and in several with an index."""
    model = tiny_model(architecture).model
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size=20_000)
    assert (tmp_path / "several/model.safetensors.index.json").exists()
    for folder in ("one", "several"):
        found = read_folder(str(tmp_path / folder))
        num_numbers = sum(weight.numel() for _, weight in weights_of(model))
        assert (found.num_parameters, found.counted) == (num_numbers, "counted in its files")
        assert found.eos_ids == {1}


def test_a_shard_that_is_missing_is_named(tmp_path: Path):
    tiny_model("qwen3").model.save_pretrained(tmp_path, max_shard_size=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    gone = sorted(index["weight_map"].values())[1]
    (tmp_path / gone).unlink()
    with pytest.raises(ConfigError, match=f"{gone} is missing, which its index names"):
        read_folder(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x02" + b"\0" * 7 + b"[]"])
def test_weights_that_are_none(content: bytes, tmp_path: Path):
    tiny_model("qwen3").model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model.safetensors"):
        read_folder(str(tmp_path))
