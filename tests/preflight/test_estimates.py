"""Estimates of memory and disk, held against what six architectures keep and what a run has written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from models import CONFIGS, tiny_model
from sluice.algorithms import resolve
from sluice.config import TrainConfig
from sluice.configfile import load
from sluice.data.packing import Piece
from sluice.preflight.disk import ledger_bytes, num_checkpoints
from sluice.preflight.folder import ModelFolder, count_parameters, read_folder
from sluice.preflight.memory import Batch, _ram_free, activation_bytes, checkpoint_bytes, training_parts
from sluice.trainers.lora import LoraModel
from sluice.trainers.model import PolicyModel
from small_runs import finished, set_up, sluice, workplace

RANKS = ["engine.process=own", "engine.num_threads=1", "trainer.name=fsdp", "trainer.num_ranks=2"]


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        yield tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("packed", "recomputed"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_activations_are_about_what_the_model_keeps(
    architecture: str, packed: bool, recomputed: bool, dtype: torch.dtype
):
    """Storages that autograd holds after a forward of 4 × 64 tokens, besides the weights."""
    config = CONFIGS[architecture]()
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    model = PolicyModel(AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention))
    if recomputed:
        model.recompute_activations()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids, positions = torch.randint(0, 128, (4, 64)), torch.arange(64).expand(4, 64)
    pieces = None
    if packed:
        ids, positions = ids.view(1, -1), positions.reshape(1, -1)
        pieces = [Piece(start, 64, None) for start in range(0, 256, 64)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.hidden_states(ids, positions, pieces=pieces)
    assert hidden.requires_grad
    folder = ModelFolder("", config, count_parameters(config), "", frozenset())
    estimate = activation_bytes(folder, dtype.itemsize, Batch(256, 64, packed, recomputed))
    if recomputed:  # what is kept, besides the layer that the estimate also has
        estimate -= activation_bytes(folder, dtype.itemsize, Batch(256, 64, packed)) / config.num_hidden_layers
        assert 0.3 < estimate / sum(kept.values()) < 1.6
    else:
        assert 0.6 < estimate / sum(kept.values()) < 1.6


@pytest.mark.parametrize("settings", [[], ["trainer.lora_rank=4"]])
def test_the_record_of_a_run_is_not_larger_than_what_is_estimated(ready: Path, settings: list[str]):
    """The ledger at most; a checkpoint's weights and optimiser nearly to the byte, as far as there are any."""
    words = ["run.num_steps=2", "checkpoint.every_steps=1", *settings]
    run = finished("train", "config.yaml", *words)
    config = load(TrainConfig, ["config.yaml"], words).config
    ledger = sum(file.stat().st_size for file in run.glob("ledger/*.parquet"))
    algorithm = resolve("cispo", {}, max_new_tokens=8, group_size=4)
    assert 0.5 < ledger / ledger_bytes(config, algorithm, longest_prompt=13) < 1
    saved = run / "checkpoints/step-000002"
    real = sum((saved / name).stat().st_size for name in ("model.safetensors", "trainer_state.pt"))
    estimate = checkpoint_bytes(config, {"policy": read_folder("model")})
    assert estimate <= real < estimate + 100_000
    assert num_checkpoints(config) == len(list(run.glob("checkpoints/step-*"))) == 2


@pytest.mark.parametrize(("words", "per_weight"), [([], 8), (RANKS, 12)], ids=["one process", "ranks"])
def test_optimiser_state_is_that_of_the_adapters(ready: Path, words: list[str], per_weight: int):
    """In memory and in checkpoints; ranks write the adapters there besides, in FP32."""
    config = load(TrainConfig, ["config.yaml"], ["model.device=cpu", "trainer.lora_rank=4", *words]).config
    model = LoraModel(tiny_model("qwen3"), rank=4, alpha=32.0, targets=(), seed=0).model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    models = {"policy": read_folder("model")}
    parts = {part.name: part.bytes for part in training_parts(config, models, 13, 64)}
    assert parts["AdamW moments"] == 2 * 4 * trained
    assert parts["gradients"] == 4 * trained
    assert parts["weights"] == 4 * models["policy"].num_parameters
    assert checkpoint_bytes(config, models) == parts["weights"] + per_weight * trained


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ([], 4),
        (["checkpoint.keep_last=2"], 3),
        (["checkpoint.best_metric=rollout/reward"], 5),
        (["checkpoint.keep_last=null"], 30),
        (["checkpoint.every_steps=null"], 1),
    ],
)
def test_checkpoints_that_lie_on_the_disk_at_once(ready: Path, settings: list[str], count: int):
    words = [
        "run.num_steps=30",
        *(settings if "every_steps" in "".join(settings) else ["checkpoint.every_steps=1", *settings]),
    ]
    assert num_checkpoints(load(TrainConfig, ["config.yaml"], words).config) == count


def test_a_control_group_may_leave_less_than_the_machine_has(tmp_path: Path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert _ram_free(tmp_path) == 8000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, text in {
        "memory.max": "max",
        "memory.current": "5000",
        "memory.stat": "anon 1\ninactive_file 300",
    }.items():
        (group / name).write_text(text + "\n")
    assert _ram_free(tmp_path) == 8000 * 1024
    (group / "memory.max").write_text("9000\n")
    assert _ram_free(tmp_path) == 9000 - 5000 + 300
    assert _ram_free(tmp_path / "elsewhere") is None


def test_what_does_not_fit_as_a_whole_is_a_warning(
    ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sluice.preflight.memory._ram_free", lambda: 2**20)
    assert sluice("check", "--offline", "config.yaml", "model.device=cpu") == 0
    printed = capsys.readouterr().out
    assert "memory    warning" in printed
    assert "and 1.0 MiB are free in RAM; lower trainer.tokens_per_micro_batch" in printed
