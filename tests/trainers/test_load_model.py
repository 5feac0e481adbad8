"""What is loaded is the whole model, or an error says what is wrong with the folder."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_local_trainer import SETTINGS
from transformers import LlamaConfig, LlamaForCausalLM

from models import CONFIGS, tiny_model
from sluice.errors import ConfigError, NonFiniteError
from sluice.trainers.local import LocalTrainer
from sluice.trainers.model import PolicyModel, load_model
from sluice.trainers.optim import Optimizer


def load(folder: Path, **changes: object) -> PolicyModel:
    settings = {"dtype": "float32", "device": "cpu", "random_weights": False, "seed": 0}
    return load_model(str(folder), **(settings | changes))  # type: ignore[arg-type]


def without(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """transformers would fill in random ones, and the run would train a model with a broken layer."""
    tiny_model("qwen3").model.save_pretrained(tmp_path)
    without(tmp_path, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(
        ConfigError, match=r"1 weights are not in the checkpoint, among them model.layers.1.mlp.up_proj"
    ):
        load(tmp_path)
    assert load(tmp_path, random_weights=True)


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    config = CONFIGS["llama"]().to_dict() | {"tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig.from_dict(config)).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert model.head.weight is model.body.get_input_embeddings().weight


def test_a_head_is_still_tied_after_several_were_loaded_at_once(tmp_path: Path) -> None:
    """As engines in threads do, with weights that come by a folder."""
    tiny_model("gemma2").model.save_pretrained(tmp_path)
    models = [tiny_model("gemma2") for _ in range(8)]
    with ThreadPoolExecutor(len(models)) as threads:
        list(threads.map(lambda model: model.load_weights(str(tmp_path)), 8 * models))
    after = tiny_model("gemma2")
    assert after.head.weight is after.body.get_input_embeddings().weight


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.head.weight[0, 0] = float("inf")
    trainer = LocalTrainer(model, None, Optimizer(model.model, SETTINGS, 1), None)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match=r"lm_head.weight holds weights that are not finite"):
        trainer.snapshot()(str(tmp_path / "out"))
