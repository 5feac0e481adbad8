"""What a model folder says about its model without loading a weight, and without torch."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sluice.data.chat import Chat, load_tokenizer
from sluice.errors import ConfigError, boundary

UNGATED = {"gpt2", "gpt_neox", "gptj", "opt", "phi", "bloom", "starcoder2"}
"""Model types whose feed-forward layers are two matrices; all others are counted with three."""
POSITIONED = {"gpt2", "opt"}
"""Those with a table of positions."""
LAYER = re.compile(r"\.\d+\.")
"""In the name of a weight: that it is of a layer, and not of embeddings or the head."""
ROUTED = re.compile(r"\.(experts\.\d+|gate)\.")
"""That it is an expert's or a router's."""
LONGEST_HEADER = 100_000_000
"""Bytes of a safetensors header, by its format."""


@dataclass(frozen=True)
class ModelFolder:
    """A model as its folder describes it."""

    path: str
    config: Any
    """Of the text model, as `transformers` reads it."""
    num_parameters: int
    counted: str
    """How: from the headers of the weights, or from the config alone."""
    eos_ids: frozenset[int]
    """Ids that end a response by the model's own word."""
    shapes: Mapping[str, list[int]] = field(default_factory=dict[str, list[int]])
    """Of its weights, by name; empty where the files are no safetensors, or not read."""

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_length(self) -> int:
        """Positions; 2**31 where there is no limit, as in `PolicyModel`."""
        return getattr(self.config, "max_position_embeddings", None) or 2**31

    @property
    def query_size(self) -> int:
        """Elements of one token's queries, in one layer."""
        return self.config.num_attention_heads * _head_size(self.config)

    @property
    def key_size(self) -> int:
        """And of its keys, or its values."""
        return _key_value_heads(self.config) * _head_size(self.config)

    @property
    def inner_size(self) -> int:
        """And of what its feed-forward layer holds between its matrices."""
        return _inner_size(self.config)

    @property
    def cache_elements(self) -> int:
        """Keys and values of one token, in all layers."""
        return 2 * self.config.num_hidden_layers * self.key_size


def read_chat(path: str) -> Chat:
    """Raises ConfigError for a folder without a tokeniser."""
    with without_torch():
        return Chat(load_tokenizer(path))


def read_folder(path: str, *, key: str = "model.path", random_weights: bool = False) -> ModelFolder:
    """Raises ConfigError for a folder that holds no model, or one whose weights are not whole."""
    folder, where = Path(path).expanduser(), f"{key}={path}"
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{where}: no model folder there (config.json is missing)")
    with without_torch(), boundary(ConfigError, f"{where}: transformers cannot read its config.json"):
        from transformers import AutoConfig

        whole = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config = whole.get_text_config()
    with boundary(ConfigError, f"{where}: its config is not that of a decoder that sluice knows"):
        count = count_parameters(config)
    shapes = None if random_weights else _shapes(folder, where)
    counted = "counted from its config" if shapes is None else "counted in its files"
    elements = count if shapes is None else sum(map(math.prod, shapes.values()))
    own = _ids(_generation_config(folder, where).get("eos_token_id")) | _ids(getattr(config, "eos_token_id", None))
    return ModelFolder(path, config, elements, counted, own, shapes or {})


def check_targets(model: ModelFolder, targets: Sequence[str]) -> None:
    """Whether the layers in its files have matrices called like all `targets` of adapters. Raises ConfigError."""
    matrices = {
        name.split(".")[-2]
        for name, shape in model.shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and LAYER.search(name) and not ROUTED.search(name)
    }
    if matrices and (unknown := sorted({*targets} - matrices)):
        raise ConfigError(
            f"trainer.lora_targets: model.path={model.path} has no layer with a matrix called {', '.join(unknown)} that adapters go to; "
            f"there are {', '.join(sorted(matrices))}"
        )


def count_parameters(config: Any) -> int:
    """Of a decoder with this config; within a few per cent for the architectures that sluice trains."""
    hidden, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    heads = config.num_attention_heads + _key_value_heads(config)
    attention = 2 * hidden * heads * _head_size(config)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0
    matrices = 2 if config.model_type in UNGATED else 3
    inner = _inner_size(config) * max(1, experts) + _shared_size(config)
    feed_forward = matrices * hidden * inner + experts * hidden
    embeddings = vocabulary * hidden * (1 if config.tie_word_embeddings else 2)
    if config.model_type in POSITIONED:
        embeddings += config.max_position_embeddings * hidden
    return embeddings + layers * (attention + feed_forward + 4 * hidden)


def _shared_size(config: Any) -> int:
    """Of what every token takes beside its experts."""
    own = getattr(config, "shared_expert_intermediate_size", None)
    return own or (getattr(config, "n_shared_experts", None) or 0) * _inner_size(config)


@contextmanager
def without_torch() -> Generator[None]:
    """transformers, if it is imported in here, takes torch for not installed: a tokeniser and a config do without it.

    Importing torch takes most of the time of a small check. Where one of the two is loaded already this does nothing.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        yield
        return
    quiet = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would say that torch was not found
    sys.modules["torch"] = None  # type: ignore[assignment]  # what Python documents for "cannot be imported"
    try:
        import transformers  # noqa: F401

        yield
    finally:
        del sys.modules["torch"]
        if quiet is None:
            del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]


def _shapes(folder: Path, where: str) -> dict[str, list[int]] | None:
    """Of the weights in the safetensors files; None where they are in files of another kind."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with boundary(ConfigError, f"{where}: {index.name} is broken"):
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return {name: shape for shard in shards for name, shape in _header(folder / shard, where).items()}
    if (folder / "model.safetensors").is_file():
        return _header(folder / "model.safetensors", where)
    if not any(folder.glob("pytorch_model*.bin*")):
        raise ConfigError(
            f"{where}: there are no weights (model.safetensors); download them, or set model.random_weights=true to start "
            "from random ones"
        )
    return None


def _header(file: Path, where: str) -> dict[str, list[int]]:
    """Shapes of all tensors of a file, whose length must be what its header says."""
    if not file.is_file():
        raise ConfigError(f"{where}: {file.name} is missing, which its index names; download it again")
    try:
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if size > LONGEST_HEADER:
                raise ValueError
            length = os.fstat(opened.fileno()).st_size
            whole = 8 + size <= length
            header = json.loads(opened.read(size)) if whole else {}
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        end = 8 + size + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        shapes = {name: [int(side) for side in tensor["shape"]] for name, tensor in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{where}: {file.name} is no safetensors file; download it again") from None
    if not whole or end != length:
        raise ConfigError(
            f"{where}: {file.name} has {length} bytes where its header asks for {end}: it is cut short; download it again"
        )
    return shapes


def _generation_config(folder: Path, where: str) -> dict[str, Any]:
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    with boundary(ConfigError, f"{where}: {file.name} is broken"):
        return dict(json.loads(file.read_text()))


def _ids(value: int | list[int] | None) -> frozenset[int]:
    return frozenset() if value is None else frozenset([value] if isinstance(value, int) else value)


def _key_value_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _inner_size(config: Any) -> int:
    names = ("moe_intermediate_size", "intermediate_size", "n_inner")
    return next((value for name in names if (value := getattr(config, name, None))), 4 * config.hidden_size)
