"""Adapters: their gradient is that of the weights by the chain rule, nothing else learns, and all others see merged weights only."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from models import tiny_model
from sluice.data.batch import Packing, make_minibatch
from sluice.engines.decoders import decoder_for
from sluice.engines.packed import PackedDecoder
from sluice.engines.threads import StepThreads
from sluice.errors import ConfigError
from sluice.trainers.lora import LoraModel
from sluice.trainers.model import PolicyModel
from sluice.weights.fingerprint import fingerprint
from trainers.test_local_trainer import ROWS, loss_of, some_samples, trainer_of

IDS = torch.arange(3, 23)[None]
POSITIONS = torch.arange(20)[None]


def adapted(kind: str = "qwen3", **words: Any) -> LoraModel:
    """With adapters that do something."""
    model = LoraModel(tiny_model(kind), **{"rank": 4, "alpha": 16.0, "targets": (), "seed": 1, **words})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(0, 0.05, generator=generator)
    return model


def merged(model: LoraModel, kind: str = "qwen3") -> PolicyModel:
    """The model without adapters that computes the same."""
    plain = tiny_model(kind)
    with torch.no_grad():
        for (name, own), (other, weight) in zip(plain.named_weights(), model.named_weights(), strict=True):
            assert name == other
            own.copy_(weight)
    return plain


def test_they_begin_as_the_model_and_are_drawn_from_their_seed():
    base, model = tiny_model("qwen3"), LoraModel(tiny_model("qwen3"), rank=4, alpha=16.0, targets=(), seed=1)
    assert fingerprint(base.named_weights()) == fingerprint(model.named_weights())
    same, other = (LoraModel(tiny_model("qwen3"), rank=4, alpha=16.0, targets=(), seed=s) for s in (1, 2))
    drawn = [[w for n, w in m.model.named_parameters() if ".lora_A." in n] for m in (model, same, other)]
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert not any(map(torch.equal, drawn[0], drawn[2]))


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "gemma2"])
def test_merged_weights_compute_the_same(kind: str):
    """W + (alpha / rank) · B A: written out here from the paper, in float64."""
    model = adapted(kind)
    layer = model.body.layers[0].mlp.up_proj
    a, b = (getattr(layer, name)["default"].weight.double() for name in ("lora_A", "lora_B"))
    expected = layer.base_layer.weight.double() + 16.0 / 4 * b @ a
    found = next(weight for name, weight in model.named_weights() if name.endswith("layers.0.mlp.up_proj.weight"))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        own, plain = (m.hidden_states(IDS, POSITIONS) for m in (model, merged(model, kind)))
    torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["rows", "packed"])
@pytest.mark.parametrize("name", ["cispo", "grpo"])
def test_the_gradient_is_the_weights_by_the_chain_rule(name: str, layout: Any):
    """dA = s · Bᵀ dW and dB = s · dW Aᵀ, with dW from a trainer of the merged model."""
    model = adapted()
    packing = Packing(1, 40, layout)
    gradients = []
    for each in (model, merged(model)):
        trainer = trainer_of(each, packing)
        batch = make_minibatch(some_samples(), packing, ROWS[name], 0)
        asyncio.run(trainer.forward_backward(batch, loss_of(name)))
        gradients.append({n: p.grad for n, p in each.model.named_parameters() if p.grad is not None})
    own, dense = gradients
    assert {n.rpartition(".lora_")[1] for n in own} == {".lora_"}, "nothing else has a gradient"
    assert len(own) == 2 * 2 * 7, "two of each of seven linear layers in each of two layers"
    for part, gradient in own.items():
        module, _, kind = part.partition(".lora_")
        layer, whole = model.model.get_submodule(module), dense[f"{module}.weight"]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = 4 * (b.T @ whole if kind.startswith("A") else whole @ a.T)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_only_adapters_are_trained_and_only_where_they_are_asked_for():
    model = adapted(targets=("q_proj", "v_proj"))
    trainer = trainer_of(model)
    before = {name: weight.clone() for name, weight in model.model.named_parameters()}
    batch = make_minibatch(some_samples(), Packing(1, 40, "rows"), ROWS["cispo"], 0)
    asyncio.run(trainer.forward_backward(batch, loss_of("cispo")))
    asyncio.run(trainer.optim_step())
    moved = {name for name, weight in model.model.named_parameters() if not torch.equal(before[name], weight)}
    assert len(moved) == 2 * 2 * 2
    assert all(".q_proj.lora_" in name or ".v_proj.lora_" in name for name in moved)
    with pytest.raises(ConfigError, match=r"no linear layer called nosuch; it has down_proj, gate_proj"):
        adapted(targets=("nosuch",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_decodes_with_merged_weights(dtype: torch.dtype):
    model = adapted()
    model = LoraModel(PolicyModel(merged(model).model.to(dtype)), rank=4, alpha=16.0, targets=(), seed=1)
    decoder = decoder_for(model, StepThreads(model.device))
    assert isinstance(decoder, PackedDecoder)
    assert fingerprint(decoder.named_weights()) == fingerprint(model.named_weights())
    old = fingerprint(decoder.named_weights())
    with torch.no_grad():
        for name, weight in model.model.named_parameters():
            if "o_proj.lora_B." in name:
                weight.fill_(0.1)
    assert fingerprint(decoder.named_weights()) == old, "a copy, until it is published"
    decoder.refresh()
    assert fingerprint(decoder.named_weights()) == fingerprint(model.named_weights()) != old


# of peft's own, when it looks at a model
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_what_is_written_loads_as_a_model_and_as_an_adapter(tmp_path: Path):
    model, base = adapted(), tmp_path / "base"
    tiny_model("qwen3").model.save_pretrained(base)
    with torch.no_grad():
        expected = model.logits(model.hidden_states(IDS, POSITIONS)[0])
    model.export()(str(tmp_path / "whole"))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    over_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "whole/adapter"))
    for found in (whole, over_base):
        with torch.no_grad():
            torch.testing.assert_close(found(input_ids=IDS).logits[0], expected, rtol=1e-5, atol=1e-5)
    again = LoraModel(tiny_model("qwen3"), rank=4, alpha=16.0, targets=(), seed=7)
    again.load_weights(str(tmp_path / "whole"))
    assert fingerprint(again.model.named_parameters()) == fingerprint(model.model.named_parameters())
    with torch.no_grad():
        other = tiny_model("qwen3")
        other.head.weight.add_(1.0)
    with pytest.raises(ConfigError, match=r"model\.path were changed"):
        LoraModel(other, rank=4, alpha=16.0, targets=(), seed=7).load_weights(str(tmp_path / "whole"))
