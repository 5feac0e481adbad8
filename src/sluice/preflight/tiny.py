"""The process of a trial: `python -m sluice.preflight.tiny train|sft FOLDER START_LIMIT_S LIMIT_S`.

Makes a tiny copy of the model that FOLDER/trial.yaml names, runs that config with it, and writes FOLDER/ended.json.
"""

from __future__ import annotations

import faulthandler
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from sluice.config import SftConfig, TrainConfig
from sluice.configfile import load
from sluice.errors import ConfigError, SluiceError
from sluice.hooks import first_line
from sluice.preflight.folder import count_parameters

LAYERS, HEADS, HEAD_SIZE, INNER, EXPERTS = 2, 2, 16, 32, 4
SMALL = 20_000_000
"""Parameters of a model that is used as it is when it cannot be shrunk."""
TINY = 2_000_000
"""Parameters that a tiny copy has at most, besides its embeddings."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors.index.json")


class NotShrinkable(ConfigError):
    """A model of which no tiny copy can be made, and that is not small itself: no fault of the config."""


def main(kind: str, folder: Path, start_limit_s: float, limit_s: float) -> None:
    """At a limit it writes where every thread is and ends the process, whatever holds it up."""
    faulthandler.dump_traceback_later(start_limit_s, exit=True)
    root = SftConfig if kind == "sft" else TrainConfig
    file = str(folder / "trial.yaml")
    end = {"error": None, "kind": "", "model": "no model"}
    try:
        config = load(root, [file]).config
        settings: list[str] = []
        if isinstance(config, SftConfig) or config.trainer.name != "dry":
            end["model"], settings = tiny_model(config, folder / "model")
        resolved: Any = load(root, [file], settings)
        from sluice.launch import sft, train

        faulthandler.dump_traceback_later(limit_s, exit=True)
        sft(resolved, "trial") if kind == "sft" else train(resolved, "trial")
    except Exception as error:
        message = str(error) if isinstance(error, SluiceError) else first_line(error)
        end |= {"error": message, "kind": type(error).__name__}
    (folder / "ended.json").write_text(json.dumps(end))


def tiny_model(config: TrainConfig | SftConfig, folder: Path) -> tuple[str, list[str]]:
    """What the model of the trial is, in words, and the settings that name it.

    Raises NotShrinkable, and ConfigError for a model that cannot be trained at all.
    """
    from transformers import AutoConfig

    from sluice.trainers.model import load_model, refuse_unknown_layers

    path = Path(config.model.path).expanduser()
    own = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    refuse_unknown_layers(f"model.path={path}", own.get_text_config())
    num_parameters = count_parameters(own.get_text_config())
    try:
        shrink(own.get_text_config())
        own.save_pretrained(folder)
        _copy_the_rest(path, folder)
        load_model(str(folder), dtype=config.model.dtype, device="cpu", random_weights=True, seed=0)
    except Exception as error:
        if num_parameters > SMALL:
            raise NotShrinkable(first_line(error)) from error
        return f"the model itself, {num_parameters:,} parameters", []
    settings = [f"model.path={folder}", "model.random_weights=true"]
    if isinstance(config, TrainConfig):
        second = {"reference.path": config.reference.path, "critic.path": config.critic.path}
        settings += [f"{key}={folder}" for key, own_path in second.items() if own_path]
    return f"a copy of {count_parameters(own.get_text_config()):,} parameters", settings


def shrink(config: Any) -> None:
    """Make a text model's config one of two narrow layers of the same kinds, with the same vocabulary and positions.

    Raises ConfigError for a config that stays large.
    """
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = LAYERS
    if kinds:
        ordered = list(dict.fromkeys(kinds))  # of each kind one
        config.layer_types = (ordered * LAYERS)[:LAYERS]
    shared = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    config.num_key_value_heads = HEADS if shared == config.num_attention_heads else 1
    config.num_attention_heads, config.hidden_size = HEADS, HEADS * HEAD_SIZE
    sizes = {"head_dim": HEAD_SIZE, "intermediate_size": INNER, "n_inner": INNER, "moe_intermediate_size": INNER}
    sizes |= {"shared_expert_intermediate_size": INNER, "num_experts": EXPERTS, "num_local_experts": EXPERTS}
    sizes |= {"num_experts_per_tok": 2, "num_shared_experts": 1, "max_window_layers": LAYERS, "rotary_dim": HEAD_SIZE}
    for name, value in sizes.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    embeddings = 2 * config.vocab_size * config.hidden_size
    if (left := count_parameters(config) - embeddings) > TINY + config.max_position_embeddings * config.hidden_size:
        raise ConfigError(f"its config cannot be made small: {left:,} parameters are left besides its embeddings")


def _copy_the_rest(source: Path, folder: Path) -> None:
    """Tokeniser, template and generation config."""
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json" and not file.name.endswith(WEIGHTS):
            shutil.copy(file, folder / file.name)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
