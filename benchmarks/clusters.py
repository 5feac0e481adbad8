"""What models take on GPUs, from public figures: constants for `simulated_run.py`. Where each is from is in docs/scaling.md."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from distributions import Distribution, LogNormal
from simulated_engine import EngineFailures, EngineRates, EngineSetting
from simulated_run import Agent, Setting, warm_up_steps
from simulated_trainer import TrainerFailures, TrainerRates


@dataclass(frozen=True)
class Gpu:
    """One of them, in BF16."""

    flops: float
    bytes_per_s: float
    memory_bytes: float
    mfu: float = 0.4
    """Share of the FLOPs that training and prompts reach, what ranks say to each other included."""
    decode_share: float = 0.5
    """Share of the memory's rate that decoding reaches."""
    hidden_share: float = 0.5
    """Share of a decode step's FLOPs that hides behind reading the weights."""


H100 = Gpu(flops=989e12, bytes_per_s=3.35e12, memory_bytes=80e9)
H200_MEASURED = Gpu(flops=749e12, bytes_per_s=4.2e12, memory_bytes=141e9)
"""What the card of docs/performance.md reached in a large product and a large copy."""


@dataclass(frozen=True)
class Model:
    parameters: float
    layers: int
    attention_width: int
    """Query heads · their size."""
    key_width: int
    """Key heads · their size."""
    replica_gpus: int
    """Over which an engine cuts it."""

    @property
    def weight_bytes(self) -> float:
        return 2 * self.parameters

    @property
    def cached_token_bytes(self) -> float:
        """A key and a value per layer."""
        return 2 * 2 * self.layers * self.key_width


MODELS = {
    "4B": Model(4.0e9, 36, 32 * 128, 8 * 128, replica_gpus=1),
    "32B": Model(32.8e9, 64, 64 * 128, 8 * 128, replica_gpus=4),
}
"""Qwen3's."""

LENGTHS = {"short": LogNormal(40, 400, 2048), "reasoning": LogNormal(4000, 32_000, 32_768)}
PROMPT_TOKENS = 256
MOST_SLOTS = 512
MEMORY_SHARE = 0.9
"""Of a GPU that an engine takes."""
TRAINING_BYTES = 18.0
"""Per parameter: weights and gradients in BF16, FP32 master weights, two moments, and room for one more copy in BF16."""
ACTIVATION_SHARE = 0.4
"""Of a training GPU's memory."""
UPDATE_S = 1.0
"""Optimiser, bookkeeping and the first gather of the weights."""
FABRIC_BYTES_PER_S = 20e9
"""At which weights go from the trainer to all engines, each of which passes them on."""
PUBLICATION_S = 1.0
"""Of pausing, checking and going on."""
SWITCH_S = 5.0
"""Of putting engines to sleep and waking them with new weights, where both share the GPUs."""
AGENT_LENGTHS = LogNormal(300, 3000, 8192)
AGENT_TURNS = 8
TOOL_S = LogNormal(2.0, 60.0, 300.0)
OBSERVATION_TOKENS = 400
RESTART_ENGINE_S = 120.0
RESTART_TRAINER_S = 300.0
CHECKPOINT_EVERY_STEPS = 10


def engine_rates(model: Model, gpu: Gpu, gpus: int) -> EngineRates:
    read = gpu.bytes_per_s * gpu.decode_share * gpus
    flops = 2 * model.parameters / (gpu.flops * gpus)
    return EngineRates(
        step_s=model.weight_bytes / read,
        sequence_s=flops * (1 - gpu.hidden_share),
        cached_token_s=model.cached_token_bytes / read,
        prompt_token_s=flops / gpu.mfu,
    )


def slots(model: Model, gpu: Gpu, tokens_in_cache: float) -> int:
    """Sequences of so many tokens, in the mean, for which a replica has memory."""
    room = MEMORY_SHARE * gpu.memory_bytes * model.replica_gpus - model.weight_bytes
    return min(MOST_SLOTS, int(room / (model.cached_token_bytes * tokens_in_cache)))


def tokens_under_way(lengths: Distribution) -> float:
    """Of a response that is being decoded, in the mean: long ones are met more often, each at its half."""
    return lengths.mean(2) / lengths.mean() / 2


def trainer_rates(model: Model, gpu: Gpu, gpus: int) -> TrainerRates:
    rate = gpu.flops * gpu.mfu
    return TrainerRates(
        token_s=6 * model.parameters / rate,
        squared_token_s=6 * model.layers * model.attention_width / rate,
        update_s=UPDATE_S,
        ranks=gpus,
    )


def fewest_training_gpus(model: Model, gpu: Gpu) -> int:
    return math.ceil(TRAINING_BYTES * model.parameters / ((1 - ACTIVATION_SHARE) * gpu.memory_bytes))


@dataclass(frozen=True)
class Cluster:
    """A model on GPUs of one kind, `training` of which train while the others decode; None: all do both, in turn."""

    model: Model
    gpus: int
    training: int | None
    max_staleness: int = 0
    gpu: Gpu = H100
    lengths: Distribution = LENGTHS["reasoning"]
    groups: int = 256
    group_size: int = 16
    steps: int = 6
    """That count."""
    hours_between_failures: float | None = None
    """Of one GPU."""
    is_agent: bool = False
    tool_workers: int | None = None
    seed: int = 0

    @property
    def replicas(self) -> int:
        return (self.gpus - (self.training or 0)) // self.model.replica_gpus

    def setting(self) -> Setting:
        model, gpu = self.model, self.gpu
        ranks = self.training or self.gpus
        lengths = AGENT_LENGTHS if self.is_agent else self.lengths
        context = PROMPT_TOKENS + tokens_under_way(lengths)
        if self.is_agent:  # half of the turns lie behind it
            context += (AGENT_TURNS - 1) / 2 * (lengths.mean() + OBSERVATION_TOKENS)
        moved_s = PUBLICATION_S + model.weight_bytes / FABRIC_BYTES_PER_S if self.training else SWITCH_S
        between_s = 3600 * self.hours_between_failures if self.hours_between_failures else None
        rates = engine_rates(model, gpu, model.replica_gpus)
        if self.is_agent:  # what comes before the last turn is in the cache already
            rates = replace(rates, prompt_token_s=rates.prompt_token_s / AGENT_TURNS)
        return Setting(
            engine=EngineSetting(
                self.replicas,
                slots(model, gpu, context),
                rates,
                moved_s,
                EngineFailures(between_s / model.replica_gpus, RESTART_ENGINE_S) if between_s else None,
            ),
            trainer=trainer_rates(model, gpu, ranks),
            lengths=lengths,
            groups_per_step=self.groups,
            group_size=self.group_size,
            max_staleness=self.max_staleness,
            num_steps=self.steps + warm_up_steps(self.max_staleness),
            prompt_tokens=PROMPT_TOKENS,
            reward_s=LogNormal(0.05, 1.0, 10.0),
            agent=Agent(AGENT_TURNS, TOOL_S, OBSERVATION_TOKENS, self.tool_workers) if self.is_agent else None,
            trainer_failures=TrainerFailures(between_s / ranks, RESTART_TRAINER_S, CHECKPOINT_EVERY_STEPS)
            if between_s
            else None,
            seed=self.seed,
        )
