"""How much memory a run will want at most, from the shapes of its models, against what is free."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sluice.config import EmbeddedEngine, ModelSection, SftConfig, TrainConfig
from sluice.configengines import ServerEngine, VllmEngine
from sluice.configtraining import AdapterFields, BatchedOptimizer, DryTrainer, FsdpTrainer
from sluice.launch.cores import engines_here
from sluice.preflight.findings import Item, size
from sluice.preflight.folder import ModelFolder
from sluice.trainers.chunks import SHORT_ATTENTION, chunk_tokens

FP32 = 4
PROCESS_BYTES = 450 * 2**20
"""Python, torch, transformers and matplotlib on a CPU."""
CHUNK_COPIES = 2
"""Buffers of a chunk's logits (`trainers.logprobs`); one more where the architecture caps them."""
DECODE_COPIES = 4
"""Logits of all slots, tempered, as probabilities and summed up."""
CACHE_STEP = 64
"""The engine's cache grows by multiples of so many tokens, and has a quarter of that more."""
SLACK = 1.1
"""What is not listed: gradients of activations, fragments."""
QUERY_LIMIT_S = 10
RAM, CUDA = "in RAM", "on the CUDA device"


@dataclass(frozen=True)
class Part:
    """Something that takes memory."""

    name: str
    bytes: float
    fixed: bool = False
    """Weights and what the optimiser keeps of them, which no setting of batch or engine makes smaller."""


@dataclass(frozen=True)
class Batch:
    """What is computed at once."""

    tokens: int
    """Of a micro-batch, padding included."""
    longest: int
    """Tokens of its longest sample."""
    packed: bool
    recomputed: bool = False
    """Whether activations are computed again in the backward."""


def check_memory(config: TrainConfig | SftConfig, parts: Sequence[Part]) -> Item:
    """`parts` against the memory of the device that the model will be on."""
    item, found = Item("memory"), _free(config.model)
    fixed = sum(part.bytes for part in parts if part.fixed)
    total = SLACK * sum(part.bytes for part in parts)
    largest = sorted(parts, key=lambda part: -part.bytes)
    item.note(", ".join(f"{part.name} {size(part.bytes)}" for part in largest))
    if found is None:
        item.summary = f"at most about {size(total)}; how much is free is not known on this system"
        return item
    free, where = found
    if where == RAM:
        ranks = config.trainer.num_ranks if isinstance(config.trainer, FsdpTrainer) else 0
        engines = _engines_apart(config) if isinstance(config, TrainConfig) else 0
        total += (1 + engines + ranks) * PROCESS_BYTES
    item.summary = f"at most about {size(total)}; {size(free)} are free {where}"
    if fixed > free:
        item.fail(
            f"weights, gradients and optimiser alone take {size(fixed)}, and {size(free)} are free {where}; take a smaller "
            "model or a larger machine"
        )
    elif total > free:
        knobs = "trainer.tokens_per_micro_batch"
        if isinstance(config, TrainConfig):
            knobs += ", engine.num_slots or rollout.max_new_tokens"
        item.warn(
            f"the run may want {size(total)} when its samples are as long as they may be, and {size(free)} are free {where}; lower "
            f"{knobs}: the largest part is {largest[0].name}"
        )
    return item


def training_parts(config: TrainConfig, models: dict[str, ModelFolder], longest_prompt: int, window: int) -> list[Part]:
    """Of all `models` (policy, and reference and critic where there are any), for prompts of at most that many tokens."""
    policy, width, rollout = models["policy"], _width(config.model), config.rollout
    samples = rollout.groups_per_step * rollout.group_size
    longest = min(window, longest_prompt + rollout.max_new_tokens)
    assert config.trainer.name != "dry"
    update = -(-samples // config.trainer.updates_per_batch)
    batch = _batch(longest, update, config.trainer)
    device = "cpu" if _in_ram(config.model) else "cuda"
    if isinstance(config.trainer, FsdpTrainer):
        parts = _ranks_parts(config, models, batch, device)
    else:
        parts = _own_parts(config, models, batch, device, num_trained(policy, config.trainer))
    if _in_ram(config.model):
        parts.append(Part("copy for a checkpoint", checkpoint_bytes(config, models)))
    elsewhere = config.num_engines_apart() and engines_here(config) is None
    if config.engine.name == "embedded" and not elsewhere:
        groups = rollout.groups_per_step * (rollout.max_staleness + 1)
        apart = _engines_apart(config)
        engines = max(1, apart)
        slots = engines * min(config.engine.num_slots, -(-groups * rollout.group_size // engines))
        length = -(-longest // CACHE_STEP) * CACHE_STEP + CACHE_STEP // 4
        prefill = min(config.engine.prefill_tokens, groups * longest)
        cache = policy.cache_elements * width * slots * length
        if config.engine.cache_gb is not None:
            cache = min(cache, engines * config.engine.cache_gb * 1e9)
        elif device == "cuda" and (free := _cuda_free()) is not None:
            cache = min(cache, free / 2)
        copies = engines * decoder_bytes(policy, width, device)
        if apart:  # each its own model, and all together what it is published through
            between = device == "cpu" and config.weights_go_by() != "broadcast"
            copies += (apart + between) * policy.num_parameters * width
        parts.append(Part("engine's weights", copies))
        parts.append(Part("key-value cache", cache + engines * policy.cache_elements * width * prefill))
        parts.append(Part("sampling", DECODE_COPIES * slots * policy.vocab_size * FP32))
    if isinstance(config.engine, ServerEngine) and not elsewhere:
        parts += _server_parts(config.engine, policy.num_parameters * width, _in_ram(config.model))
    return parts


def _own_parts(
    config: TrainConfig, models: dict[str, ModelFolder], batch: Batch, device: str, count: int
) -> list[Part]:
    """Of a trainer in one process; `count` of the policy's parameters learn."""
    policy, width = models["policy"], _width(config.model)
    parts = [
        *learner("policy", policy, width, count),
        Part("activations", activation_bytes(policy, width, batch)),
        Part("logits", logits_bytes(policy, width, batch, device)),
    ]
    if "reference" in models:
        parts.append(Part("reference", models["reference"].num_parameters * width, fixed=True))
    if critic := models.get("critic"):
        parts += learner("critic", critic, width, critic.num_parameters)
        parts.append(Part("critic's activations", activation_bytes(critic, width, batch)))
    return parts


def _ranks_parts(config: TrainConfig, models: dict[str, ModelFolder], batch: Batch, device: str) -> list[Part]:
    """Of all ranks in RAM, or of one on its GPU. Shards of what learns are in FP32; each rank has a micro-batch, and the whole head while
    it is used."""
    trainer, width = config.trainer, _width(config.model)
    assert isinstance(trainer, FsdpTrainer)
    ranks = trainer.num_ranks if device == "cpu" else 1
    share = ranks / trainer.num_ranks
    divided = trainer.tensor_parallel * trainer.context_parallel
    parts: list[Part] = []
    for name in ("policy", "critic"):
        if model := models.get(name):
            of = "" if name == "policy" else f"{name}'s "
            has_adapters = name == "policy" and trainer.lora_rank is not None
            count = num_trained(model, trainer) if has_adapters else model.num_parameters
            own = learner(name, model, width if has_adapters else FP32, count)
            parts += [Part(p.name, share * p.bytes, p.fixed) for p in own]
            parts.append(Part(f"{of}activations", ranks / divided * activation_bytes(model, width, batch)))
    policy = models["policy"]
    parts.append(Part("logits", ranks * logits_bytes(policy, width, batch, device)))
    head = policy.vocab_size * policy.config.hidden_size
    gradient = FP32 if trainer.lora_rank is None else 0
    parts.append(Part("the head as a whole, and its gradient", ranks * head * (width + gradient)))
    if "reference" in models:
        parts.append(Part("reference", share * models["reference"].num_parameters * width, fixed=True))
    return parts


def _server_parts(engine: ServerEngine, weights: float, in_ram: bool) -> list[Part]:
    """Of servers that we start beside the trainer. On a GPU their share is their own affair."""
    if not in_ram or engine.url:
        return []
    cache = engine.cache_gb * 2**30 if isinstance(engine, VllmEngine) else 0
    return [
        Part("servers' weights", engine.replicas * weights),
        Part("servers' key-value cache", engine.replicas * cache),
    ]


def _engines_apart(config: TrainConfig) -> int:
    """In processes of their own on this machine."""
    engine = engines_here(config)
    return engine.replicas if isinstance(engine, EmbeddedEngine) else 0


def sft_parts(config: SftConfig, model: ModelFolder, longest_row: int) -> list[Part]:
    width, trainer = _width(config.model), config.trainer
    batch = _batch(longest_row, trainer.samples_per_update, trainer)
    parts = [
        *learner("policy", model, width, num_trained(model, trainer)),
        Part("activations", activation_bytes(model, width, batch)),
        Part("logits", logits_bytes(model, width, batch, "cpu" if _in_ram(config.model) else "cuda")),
    ]
    if _in_ram(config.model):
        parts.append(Part("copy for a checkpoint", checkpoint_bytes(config, {"policy": model})))
    return parts


def num_trained(model: ModelFolder, trainer: AdapterFields) -> int:
    """Parameters: those of the model, or of adapters for all of its linear layers."""
    if trainer.lora_rank is None:
        return model.num_parameters
    config = model.config
    hidden, queries, keys, inner = config.hidden_size, model.query_size, model.key_size, model.inner_size
    ends = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner)
    return config.num_hidden_layers * trainer.lora_rank * ends


def learner(owner: str, model: ModelFolder, width: int, count: int) -> list[Part]:
    """A model of which `count` parameters learn: with BF16 weights these have FP32 masters, and gradients in both."""
    half = width < FP32
    of = "" if owner == "policy" else f"{owner}'s "
    return [
        Part(f"{of}weights", model.num_parameters * width, fixed=True),
        *([Part(f"{of}FP32 masters", count * FP32, fixed=True)] if half else []),
        Part(f"{of}gradients", count * (FP32 + (width if half else 0)), fixed=True),
        Part(f"{of}AdamW moments", 2 * count * FP32, fixed=True),
    ]


def checkpoint_bytes(config: TrainConfig | SftConfig, models: dict[str, ModelFolder]) -> float:
    """Weights and the state of their optimiser: two moments, and FP32 masters of BF16 weights, which shards are in any case."""
    width = _width(config.model)
    learners = {name: models[name] for name in ("policy", "critic") if name in models}
    weights = sum(model.num_parameters for model in learners.values())
    trained = weights
    if "policy" in models and not isinstance(config.trainer, DryTrainer):
        trained += num_trained(models["policy"], config.trainer) - models["policy"].num_parameters
    masters = width < FP32 or isinstance(config.trainer, FsdpTrainer)
    return width * weights + (masters * FP32 + 2 * FP32) * trained


def activation_bytes(model: ModelFolder, width: int, batch: Batch) -> float:
    """What the forward of a micro-batch keeps for its backward; a rough figure, fitted to what six architectures keep."""
    config = model.config
    experts = getattr(config, "num_experts_per_tok", None) or 1
    queries, keys = model.query_size, model.key_size
    per_token = 4 * model.inner_size * experts + 10 * config.hidden_size + 5 * queries + 5 * keys
    if batch.packed:  # what attention sees, in blocks
        per_token += 2 * queries + 2 * keys
    if getattr(config, "attn_logit_softcapping", None):  # scores of every pair
        per_token += 3 * config.num_attention_heads * batch.longest
    elif batch.packed and width == FP32:
        per_token += config.num_attention_heads * min(batch.longest, SHORT_ATTENTION)
    if batch.recomputed:  # the input of each layer, and all of one at a time
        return batch.tokens * (config.num_hidden_layers * config.hidden_size + per_token) * width
    return batch.tokens * config.num_hidden_layers * per_token * width


def logits_bytes(model: ModelFolder, width: int, batch: Batch, device: str) -> float:
    """A chunk of logits; and for a BF16 model its head in FP32."""
    head = model.vocab_size * model.config.hidden_size if width < FP32 else 0
    copies = CHUNK_COPIES + bool(getattr(model.config, "final_logit_softcapping", None))
    tokens = min(chunk_tokens(model.vocab_size, device), batch.tokens)
    return FP32 * (head + copies * tokens * model.vocab_size)


def decoder_bytes(model: ModelFolder, width: int, device: str) -> float:
    """The engine's copy of what its layers multiply by; on a CPU in FP32 once more in MKL's order, and of BF16 the head in FP32."""
    config = model.config
    embedding = model.vocab_size * config.hidden_size
    layers = model.num_parameters - embedding * (1 if config.tie_word_embeddings else 2)
    if device != "cpu":
        return layers * width
    return layers * 2 * FP32 if width == FP32 else layers * width + embedding * FP32


def _batch(longest: int, samples: int, trainer: BatchedOptimizer) -> Batch:
    tokens = max(longest, min(trainer.tokens_per_micro_batch, samples * longest))
    return Batch(tokens, longest, trainer.layout == "packed", trainer.activation_checkpointing)


def _width(model: ModelSection) -> int:
    return FP32 if model.dtype == "float32" else 2


def _in_ram(model: ModelSection) -> bool:
    return model.device == "cpu" or _cuda_free() is None


def _free(model: ModelSection) -> tuple[int, str] | None:
    """Bytes, and where; None where that cannot be found out."""
    if model.device != "cpu" and (cuda := _cuda_free()) is not None:
        return cuda, CUDA
    if model.device == "cuda" or (ram := _ram_free()) is None:
        return None
    return ram, RAM


@cache
def _cuda_free() -> int | None:
    """Of the first visible device, by nvidia-smi, since torch takes seconds to ask."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    if not visible or visible == "-1":
        return None
    command = ["nvidia-smi", f"--id={visible}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_LIMIT_S, check=True)
        return int(done.stdout.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _ram_free(root: Path = Path("/")) -> int | None:
    """What the kernel says is available, or less where a control group allows less."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    group = root / "sys/fs/cgroup"
    with suppress(OSError, ValueError):  # no limit is the word "max"
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, int((group / "memory.max").read_text()) - used + int(stat.get("inactive_file", 0)))
    return max(0, free)
