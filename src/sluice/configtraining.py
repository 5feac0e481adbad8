"""The sections of the config that say what is learned and how: algorithm, reference, critic, trainer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from sluice.configbase import Beta, FinitePositive, NonNegativeFloat, NonNegativeInt, NumProcesses, NumThreads, Section

Layout = Literal["rows", "packed"]
AlgorithmName = Literal[
    "cispo",
    "grpo",
    "dr_grpo",
    "glm",
    "dapo",
    "gspo",
    "unified",
    "sapo",
    "dppo",
    "reinforce",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "ppo",
]


class AlgorithmSection(Section):
    name: AlgorithmName = "cispo"
    """A row of the algorithm table; the settings below change single words of it, and left out are as in the row."""
    advantage: Literal["z_score", "centred", "leave_one_out", "raw", "gae"] | None = None
    """(R - mean) / (std + eps) in the group, R - mean, R - mean of the others, R, or by the critic's values."""
    normalise: Literal["none", "batch_std", "whiten"] | None = None
    """Over the whole batch: divide by the std of all advantages, or whiten them over all loss tokens."""
    credit: Literal["trajectory", "turn"] | None = None
    """Each turn is worth the whole trajectory's reward, or its own and that of the turns after it."""
    std_eps: FinitePositive | None = None
    """Added to the standard deviation (advantage: z_score, normalise: batch_std)."""
    std_ddof: Literal[0, 1] | None = None
    """1: sample standard deviation, over n - 1; 0: over n."""
    gamma: Annotated[float, Field(gt=0, le=1)] | None = None
    """Discount per token (advantage: gae) or per turn (credit: turn)."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] | None = None
    """λ of advantage: gae; 1 trusts the returns only, 0 the critic only."""
    ratio: Literal["token", "sequence", "none"] | None = None
    """Importance ratio per token, one per sequence (length-normalised), or none (on-policy)."""
    clip: Literal["surrogate", "weight", "soft_gate", "none"] | None = None
    """PPO's clipped surrogate, CISPO's clipped weight, SAPO's soft gate, or no bound."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Trust region below: ratio >= 1 - clip_low (clip: surrogate, mask: trust_region)."""
    clip_high: FinitePositive | None = None
    """Trust region above: ratio <= 1 + clip_high (clip: surrogate, mask: trust_region)."""
    dual_clip: NonNegativeFloat | None = None
    """Bound of the ratio itself where the advantage is negative (clip: surrogate); above 1, or 0 for none."""
    ratio_max: FinitePositive | None = None
    """Upper bound of the ratio itself, not of its distance from 1 (clip: weight)."""
    ratio_min: FinitePositive | None = None
    """Lower bound of the ratio itself (clip: weight); no row sets one."""
    gate_positive: FinitePositive | None = None
    """Temperature of the soft gate where the advantage is positive (clip: soft_gate)."""
    gate_negative: FinitePositive | None = None
    """And where it is not; larger fades faster."""
    mask: Literal["none", "trust_region", "tv"] | None = None
    """Drops the tokens that PPO would clip (trust_region), or whose probability has moved too far (tv)."""
    tv_low: Annotated[float, Field(gt=0, lt=1)] | None = None
    """How far a token's probability may fall where the advantage is negative (mask: tv)."""
    tv_high: Annotated[float, Field(gt=0, lt=1)] | None = None
    """How far a token's probability may rise where the advantage is positive (mask: tv)."""
    aggregation: Literal["token_mean", "sequence_mean", "prompt_mean", "constant", "blend"] | None = None
    """What divides the sum of token losses: loss tokens; each sequence's tokens, then sequences; each prompt's tokens, then
    prompts; sequences × loss_constant; or a mixture of the first two."""
    loss_constant: FinitePositive | None = None
    """Divisor of `aggregation: constant`; left out, the row's, or else rollout.max_new_tokens."""
    token_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of token_mean in `aggregation: blend`; the rest is sequence_mean."""
    kl_coef: NonNegativeFloat | None = None
    """Weight of the divergence from the reference policy; every row has 0, which needs no reference."""
    kl: Literal["loss", "reward"] | None = None
    """Where the divergence goes."""
    kl_estimator: Literal["k1", "k2", "k3", "k1_st", "k3_st"] | None = None
    """How it is estimated; _st: that value with the gradient of k2."""
    entropy_coef: NonNegativeFloat | None = None
    """Weight of an entropy bonus; every row has 0."""
    correction: Literal["none", "tis", "mis", "icepop"] | None = None
    """Weight trainer / engine of a token's loss: truncated, or 0 outside of bounds; needs old_logprobs: recomputed."""
    correction_level: Literal["token", "sequence", "geometric"] | None = None
    """The weight of the token, its product over the response, or its geometric mean."""
    correction_max: FinitePositive | None = None
    """Upper bound of the weight: 2 for tis and mis, 5 for icepop when left out."""
    correction_min: FinitePositive | None = None
    """Lower bound (mis, icepop): 0.5 for icepop when left out."""
    rejection: Literal["none", "sequence", "geometric"] | None = None
    """Drops a response whose product, or geometric mean, of trainer / engine lies outside of bounds."""
    rejection_min: FinitePositive | None = None
    """When left out, 0.5 (sequence) or 0.99 (geometric)."""
    rejection_max: FinitePositive | None = None
    """When left out, 2 (sequence) or 1.01 (geometric)."""
    dynamic_sampling: bool | None = None
    """Reject groups whose rewards are all equal, and sample others."""
    old_logprobs: Literal["engine", "recomputed"] = "engine"
    """What the ratio divides by: the engine's log-probs, or the trainer's own before the first update of the step."""

    def overrides(self) -> dict[str, Any]:
        """The words that differ from the row."""
        return self.model_dump(exclude={"name", "old_logprobs"}, exclude_none=True)


class ReferenceSection(Section):
    path: str | None = None
    """Model folder of the reference policy; left out, model.path: the policy as the run begins."""
    update_every_steps: PositiveInt | None = None
    """Steps after which the policy as it is becomes the reference; left out, never."""


class OptimizerSection(Section):
    learning_rate: FinitePositive = 1e-6
    """Peak learning rate of AdamW."""
    warmup_updates: NonNegativeInt = 0
    """Updates over which the learning rate rises from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How it falls afterwards, over the rest of the run."""
    final_learning_rate: NonNegativeFloat = 0.0
    """Where linear and cosine end."""
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False)
    """Of AdamW."""
    eps: FinitePositive = 1e-15
    """Of AdamW; RL gradients lie between 1e-18 and 1e-5 (MiniMax-M1, section 3), so a larger one freezes weights."""
    weight_decay: NonNegativeFloat = 0.0
    """Of AdamW; not applied to vectors (norms, biases)."""
    max_grad_norm: FinitePositive = 1.0
    """Gradients are scaled down to this global norm."""

    def check_schedule(self, key: str) -> None:
        """Raises ValueError; `key` names the section."""
        if self.schedule == "constant" and self.final_learning_rate > 0:
            raise ValueError(
                f"{key}.final_learning_rate has no effect with {key}.schedule=constant; set schedule to linear or cosine, or leave it out"
            )
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(f"{key}.final_learning_rate is above {key}.learning_rate; schedules only fall")


class CriticSection(OptimizerSection):
    """Of `advantage: gae`."""

    model: Literal["own", "head"] = "own"
    """own: a second model with a value head; head: a value head on the policy's hidden states, which it leaves alone."""
    path: str | None = None
    """Model folder that `model: own` begins with; left out, model.path."""
    learning_rate: FinitePositive = 1e-5
    """Peak learning rate of AdamW."""
    value_clip: FinitePositive | None = 0.5
    """How far a value may move from the one before the step until its loss is clipped; null: as far as it likes."""
    pretrain_steps: NonNegativeInt = 0
    """Steps at the start in which only the critic learns."""


class BatchedOptimizer(OptimizerSection):
    tokens_per_micro_batch: PositiveInt = 16384
    """Tokens in one forward and backward, in rows with their padding, packed with a shared prompt counted once; the loss does not depend
    on it. A longer sample goes alone."""
    layout: Layout = "packed"
    """packed: one row without padding, in which a group's prompt stands once; rows: padded to the longest of the micro-batch."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer for the backward and compute the rest again: about a third more time for much less memory."""
    compile: bool = False
    """Put the model's training forward through `torch.compile`, which needs a C++ compiler: a minute or more at the first
    update, when nothing else is done, for a gain that is worth measuring first (`benchmarks/trainer.py --settings trainer.compile=true`)."""


class AdapterFields(Section):
    lora_rank: PositiveInt | None = None
    """Train adapters of this rank over frozen weights (LoRA; needs `pip install peft`); left out, train the weights."""
    lora_alpha: FinitePositive = 32.0
    """What an adapter adds is scaled by lora_alpha / lora_rank."""
    lora_targets: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), strict=False)
    """Names of the linear layers that get one, e.g. `[q_proj, v_proj]`; left out, all but the head."""

    def check_adapters(self) -> None:
        """Raises ValueError."""
        for name in ("lora_alpha", "lora_targets"):
            if self.lora_rank is None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"trainer.{name} has no effect without trainer.lora_rank; set that, or leave it out")


class LocalTrainer(BatchedOptimizer, AdapterFields):
    name: Literal["local"] = "local"
    """One process, one device."""
    updates_per_batch: PositiveInt = 1
    """Optimiser updates per step; each takes its share of the step's samples, every sample once."""


class FsdpTrainer(BatchedOptimizer, AdapterFields):
    name: Literal["fsdp"] = "fsdp"
    """Several processes, each with a shard of the model, its gradient and its optimiser state (torch FSDP2)."""
    num_ranks: NumProcesses = 2
    """Processes; on GPUs one for each. tokens_per_micro_batch is for each of them."""
    num_threads: NumThreads | None = None
    """CPU threads of each; left out, those cores that the engine leaves, divided."""
    tensor_parallel: PositiveInt = 1
    """Ranks that divide the matrices of each layer; for layers like those of Llama, Mistral and Qwen, and not with `compile`."""
    context_parallel: PositiveInt = 1
    """Ranks that divide the tokens of a micro-batch, for samples too long for one; in attention they divide the heads."""
    cpu_offload: bool = False
    """Keep shards and optimiser state in RAM instead of on the GPU, and step there: slower, for models that do not fit otherwise."""
    updates_per_batch: PositiveInt = 1
    """Optimiser updates per step; each takes its share of the step's samples, every sample once."""
    answer_limit_s: Annotated[float, Field(gt=0, le=1e9)] = 3600.0
    """Longest wait for a rank, whether it loads the model, reads a checkpoint, writes one or makes an update; one that takes longer is
    killed, and the run ends."""

    @property
    def num_data_ranks(self) -> int:
        """Ranks, or sets of ranks, that have micro-batches of their own."""
        return self.num_ranks // (self.tensor_parallel * self.context_parallel)

    def check_ranks(self, engine: str) -> None:
        """Raises ValueError for what cannot work together. `engine` is where it generates, or its name."""
        if self.num_ranks % (self.tensor_parallel * self.context_parallel):
            raise ValueError(
                f"trainer.tensor_parallel={self.tensor_parallel} × trainer.context_parallel={self.context_parallel} must divide "
                f"trainer.num_ranks={self.num_ranks}"
            )
        if self.compile and self.tensor_parallel > 1:
            raise ValueError(
                f"trainer.compile does not work with trainer.tensor_parallel={self.tensor_parallel}: torch's compiler cannot follow what "
                "divides a layer's matrices, for rows of any length; leave one of the two out"
            )
        if engine == "trainer":
            raise ValueError(
                "engine.process=trainer generates with the trainer's own weights, of which no process of trainer.name=fsdp has all; "
                "set engine.process=own"
            )


class DryTrainer(Section):
    name: Literal["dry"] = "dry"
    """Changes no weights and loads none: to try data, rewards and the loop with the scripted engine."""
    updates_per_batch: PositiveInt = 1
    """Minibatches per step."""


class SftTrainer(BatchedOptimizer, AdapterFields):
    learning_rate: FinitePositive = 1e-5
    """Peak learning rate of AdamW."""
    samples_per_update: PositiveInt = 64
    """Samples per optimiser update."""
