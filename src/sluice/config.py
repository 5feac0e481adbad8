"""The whole config tree and the checks across its fields. Imports neither torch nor any room.

Every field has its vetted default here and nowhere else; the string under a field is its documentation, from
which `docs/config.md` is generated. Reading files and overrides is `sluice.configfile`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from sluice.configbase import DottedPath, Fraction, NonNegativeInt, NumProcesses, NumThreads, Section
from sluice.configengines import EmbeddedEngine, ScriptedEngine, ServerEngine, SglangEngine, VllmEngine
from sluice.configplacement import LocalPlacement, RayPlacement
from sluice.configrewards import AnyReward, MatchReward, MathReward
from sluice.configsafety import CheckpointSection, ChecksSection, WatchdogSection
from sluice.configtraining import (
    AlgorithmSection,
    CriticSection,
    DryTrainer,
    FsdpTrainer,
    LocalTrainer,
    ReferenceSection,
    SftTrainer,
)

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]


class RunSection(Section):
    name: str | None = Field(default=None, pattern=r"^\w[\w.-]*$")
    """Folder name of the run; left out, the name of the config file and the time."""
    folder: str = "runs"
    """Where run folders are made."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds the prompt order and every sample; the same config gives the same numbers on the same machine."""
    num_threads: NumThreads | None = None
    """CPU threads for torch; left out, torch decides, or with engine.process=own those cores that the engine leaves."""
    disk_wait_s: PositiveFloat = 600.0
    """Longest wait for room on a full disk before the run ends."""


class TrainRun(RunSection):
    num_steps: PositiveInt = 100
    """Steps; each samples groups, updates the policy and publishes its weights."""
    stop_at_reward: float | None = Field(default=None, allow_inf_nan=False)
    """End the run after the first step whose `rollout/reward` reaches this; left out, all steps are made."""


class SftRun(RunSection):
    num_epochs: PositiveInt = 1
    """Times that the data is gone through."""
    log_every: PositiveInt = 10
    """Updates per line of metrics."""


class ModelSection(Section):
    path: str
    """Hugging Face model folder with a tokeniser."""
    random_weights: bool = False
    """Take only the architecture (`config.json`) and the tokeniser from `path` and start from random weights, seeded by `run.seed`."""
    dtype: Dtype = "float32"
    """Weights and activations. With bfloat16 the trainer keeps FP32 master weights; the head and log-softmax are FP32 in both."""
    device: Device = "auto"
    """auto takes a CUDA device when there is one."""


class FileData(Section):
    path: str
    """JSONL file, Parquet file, or folder written by `datasets.save_to_disk`."""
    format: Literal["auto", "jsonl", "parquet", "hf"] = "auto"
    """auto decides by what is at `path`."""
    split: str | None = None
    """Split of a Hugging Face DatasetDict."""
    prompt: str = "prompt"
    """Column with the prompt: a text, or a list of messages with `role` and `content`."""
    system_prompt: str | None = None
    """Put before every prompt as a system message; needs a tokeniser with a chat template."""
    shuffle: bool = True
    """A new order every epoch, drawn from `run.seed`; false keeps the order of the file."""


class PromptData(FileData):
    reference: str | None = None
    """Column with what rewards compare with: gold answer, tests …"""
    reference_pattern: str | None = None
    """Regular expression whose first group is the reference, e.g. `#### (.+)`; a row that it does not match is an error."""
    id: str | None = None
    """Column that names a row; left out, file name and row number."""
    metadata: tuple[str, ...] = Field(default=(), strict=False)
    """Columns handed to rewards and shown in the ledger."""
    long_prompts: Literal["error", "skip"] = "error"
    """What to do with a prompt that leaves no room for `rollout.max_new_tokens`: end the run, or skip it with an event."""


class SftData(FileData):
    response: str = "response"
    """Column with the text to learn; the loss is on its tokens and on the end-of-sequence token only."""


class RolloutSection(Section):
    groups_per_step: PositiveInt = 32
    """Groups (prompts) per step."""
    group_size: PositiveInt = 8
    """Samples per group."""
    max_new_tokens: PositiveInt = 256
    """Longest completion."""
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    """Sampling temperature; the trainer's log-probs are taken at the same one."""
    top_p: Fraction = 1.0
    """Nucleus sampling: of the most likely tokens, as few as reach this probability; all log-probs are over those only."""
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Sample among the k most likely tokens only; 0 is off. All log-probs are over those only."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), strict=False)
    """Texts that end a completion."""
    stop_token_ids: tuple[NonNegativeInt, ...] = Field(default=(), strict=False)
    """Token ids that end a completion, besides the model's own end-of-sequence ids."""
    routing_replay: bool = False
    """Of a mixture of experts: the trainer takes, for each token and layer, the experts that the engine's router chose, and weighs them by
    its own router's logits (rollout routing replay, R3). The engine has to report them, and they are in the ledger: 2 bytes for each token,
    layer and expert."""
    max_staleness: NonNegativeInt = 0
    """How many versions of the policy, of which each step makes one, a token may be older than what it trains; 0 is synchronous."""
    environment: Literal["single_turn"] | DottedPath = "single_turn"
    """What plays an attempt: single_turn, or `module:function` with `async (prompt, policy) -> Trajectory`."""
    environment_workers: Annotated[int, Field(ge=0, le=4096)] = 0
    """Processes that an environment of your own is played in, each with many attempts side by side; 0: it is played in the run's own."""
    timeout_s: PositiveFloat = 3600.0
    """Longest attempt at a prompt, generation included; one that takes longer has no score."""
    engine_retries: NonNegativeInt = 2
    """Times that a generation that failed in the engine is tried again; then its attempt has no score."""
    filter: DottedPath | None = None
    """`module:function` with `(group) -> bool`: false rejects the group, and another prompt takes its place."""
    max_rejected_groups: PositiveInt | None = None
    """Groups that may be rejected while one step is filled before the run ends; left out, 10 × groups_per_step."""
    max_failed_groups: PositiveInt = 4
    """Groups in a row in which no sample could be scored before the run ends."""


class TrainConfig(Section):
    """`sluice train`"""

    run: TrainRun = TrainRun()
    model: ModelSection
    data: PromptData
    rollout: RolloutSection = RolloutSection()
    engine: Annotated[EmbeddedEngine | VllmEngine | SglangEngine | ScriptedEngine, Field(discriminator="name")] = (
        EmbeddedEngine()
    )
    algorithm: AlgorithmSection = AlgorithmSection()
    reference: ReferenceSection = ReferenceSection()
    critic: CriticSection = CriticSection()
    rewards: tuple[AnyReward, ...] = Field(strict=False, min_length=1)
    """What a response is worth: the weighted sum of these."""
    reward_workers: NumProcesses = 1
    """Processes that compute rewards."""
    trainer: Annotated[LocalTrainer | FsdpTrainer | DryTrainer, Field(discriminator="name")] = LocalTrainer()
    placement: Annotated[LocalPlacement | RayPlacement, Field(discriminator="name")] = LocalPlacement()
    checkpoint: CheckpointSection = CheckpointSection()
    watchdog: WatchdogSection = WatchdogSection()
    checks: ChecksSection = ChecksSection()

    @model_validator(mode="after")
    def _engine_fits(self) -> TrainConfig:
        if isinstance(self.engine, EmbeddedEngine):
            self.engine.check_process(self.rollout.max_staleness)
        if isinstance(self.placement, RayPlacement):
            has_ranks = isinstance(self.trainer, FsdpTrainer)
            self.placement.check_fits(
                self.num_engines_apart() > 0, has_ranks, self.rollout.environment_workers > 0, self.weights_go_by()
            )
            num_ranks = self.trainer.num_ranks if isinstance(self.trainer, FsdpTrainer) else 0
            self.placement.check_layout(num_ranks, self.num_engines_apart(), self.gpus_of_engine())
            if isinstance(self.engine, ServerEngine):
                self.placement.check_server(self.engine)
        if isinstance(self.engine, ServerEngine):
            rollout = self.rollout
            self.engine.check_run(rollout.max_staleness, rollout.top_p, rollout.top_k, self.model.device)
            if self.engine.publication == "broadcast" and (why := self._why_not_broadcast(self.engine)):
                raise ValueError(
                    f"engine.publication=broadcast with engine.name={self.engine.name} cannot work with {why}; set "
                    "engine.publication=disk"
                )
        return self

    @model_validator(mode="after")
    def _rollout_fits(self) -> TrainConfig:
        if self.rollout.environment_workers and self.rollout.environment == "single_turn":
            raise ValueError(
                "rollout.environment_workers has no effect with rollout.environment=single_turn, which computes nothing; leave it out"
            )
        if self.rollout.routing_replay and (why := self._no_routing_replay()):
            raise ValueError(f"rollout.routing_replay=true cannot work with {why}; leave one of the two out")
        return self

    @model_validator(mode="after")
    def _trainer_fits(self) -> TrainConfig:
        samples = self.rollout.groups_per_step * self.rollout.group_size
        if self.trainer.updates_per_batch > samples:
            raise ValueError(
                f"trainer.updates_per_batch={self.trainer.updates_per_batch} is more than the {samples} samples of a step "
                f"({self.rollout.groups_per_step} groups × {self.rollout.group_size}); every update needs a sample"
            )
        if self.trainer.name == "dry" and self.engine.name != "scripted":
            raise ValueError(
                f"trainer.name=dry loads no model, and engine.name={self.engine.name} needs the trainer's; set engine.name=scripted, or "
                "trainer.name=local"
            )
        if self.trainer.name == "dry" and self.algorithm.old_logprobs == "recomputed":
            raise ValueError(
                "algorithm.old_logprobs=recomputed needs a model, and trainer.name=dry has none; set algorithm.old_logprobs=engine"
            )
        if self.engine.name == "scripted" and self.trainer.name != "dry" and self.algorithm.old_logprobs == "engine":
            raise ValueError(
                "engine.name=scripted says log-prob 0 for every token, so ratios against it mean nothing; set "
                "algorithm.old_logprobs=recomputed, or trainer.name=dry"
            )
        if isinstance(self.engine, VllmEngine) and not isinstance(self.trainer, DryTrainer):
            self.engine.check_adapter(self.trainer.lora_rank, self.model.random_weights)
        if not isinstance(self.trainer, DryTrainer):
            self.trainer.check_schedule("trainer")
            self.trainer.check_adapters()
        if isinstance(self.trainer, FsdpTrainer):
            self.trainer.check_ranks(
                self.engine.process if isinstance(self.engine, EmbeddedEngine) else self.engine.name
            )
        return self

    @model_validator(mode="after")
    def _critic_fits(self) -> TrainConfig:
        self.critic.check_schedule("critic")
        if self.critic.model == "head" and self.critic.path is not None:
            raise ValueError(
                "critic.path has no effect with critic.model=head, which has no model of its own; leave it out"
            )
        if self.critic.pretrain_steps >= self.run.num_steps:
            raise ValueError(
                f"critic.pretrain_steps={self.critic.pretrain_steps} leaves the policy none of the {self.run.num_steps} steps "
                "of run.num_steps to learn in"
            )
        return self

    @model_validator(mode="after")
    def _checkpoint_fits(self) -> TrainConfig:
        if self.checkpoint.auto_resume and self.run.name is None:
            raise ValueError(
                "checkpoint.auto_resume needs run.name: without it every start makes a new folder; set run.name"
            )
        return self

    @model_validator(mode="after")
    def _rewards_fit(self) -> TrainConfig:
        if self.data.reference_pattern is not None and self.data.reference is None:
            raise ValueError(
                "data.reference_pattern has no effect without data.reference; name the column it is searched in"
            )
        labels = [reward_label(reward) for reward in self.rewards]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"rewards: two parts are called {twice[0]!r}; give one of them another label")
        if "turns" in labels:
            raise ValueError("rewards: 'turns' names what an environment gives for single turns; choose another label")
        for i, reward in enumerate(self.rewards):
            if isinstance(reward, MatchReward) and reward.against == "nothing" and reward.pattern is None:
                raise ValueError(f"rewards.{i}: against=nothing compares with no reference, so it needs a pattern")
            compares = isinstance(reward, MathReward) or (
                isinstance(reward, MatchReward) and reward.against == "reference"
            )
            if compares and self.data.reference is None:
                raise ValueError(
                    f"rewards.{i} ({reward.name}) compares with the reference, but data.reference names no column"
                )
        if all(reward.weight == 0 for reward in self.rewards):
            raise ValueError("rewards: every weight is 0, so no response is worth anything; give one a weight")
        return self

    @model_validator(mode="after")
    def _checks_fit(self) -> TrainConfig:
        """A default that has nothing to look at is let be: what `config show` prints must be readable again."""
        severities = self.checks.severities()
        for name, why in self.idle_checks().items():
            if severities[name] not in ("off", ChecksSection.model_fields[name].default):
                raise ValueError(f"checks.{name}={severities[name]} has no effect: {why}; leave it out")
        default = ChecksSection.model_fields["max_error_share"].default
        if severities["outcome_budget"] == "off" and self.checks.max_error_share != default:
            raise ValueError(
                "checks.max_error_share has no effect with checks.outcome_budget=off; leave one of them out"
            )
        compared = {"first_update_ratio", "padded_packed"} - self.idle_checks().keys()
        if self.checks.logprob_tolerance is not None and all(severities[name] == "off" for name in compared):
            raise ValueError(
                "checks.logprob_tolerance has no effect: neither checks.first_update_ratio nor checks.padded_packed is made; leave it out"
            )
        return self

    def _no_routing_replay(self) -> str:
        """What it cannot work with, and why; empty when it can."""
        engine, trainer = self.engine, self.trainer
        if isinstance(engine, ScriptedEngine):
            return "engine.name=scripted, which has no routers that choose experts"
        if not isinstance(trainer, DryTrainer) and trainer.compile:
            return "trainer.compile=true: the experts of a token come from outside of the model that is compiled"
        if isinstance(trainer, FsdpTrainer) and trainer.tensor_parallel > 1:
            return f"trainer.tensor_parallel={trainer.tensor_parallel}, which divides no layers of experts"
        if isinstance(trainer, FsdpTrainer) and trainer.context_parallel > 1:
            return (
                f"trainer.context_parallel={trainer.context_parallel}: the experts of a micro-batch's tokens are not divided among "
                "ranks"
            )
        return ""

    def num_engines_apart(self) -> int:
        """Engines that are started as processes of their own: ours, or servers."""
        engine = self.engine
        if isinstance(engine, ServerEngine):
            return engine.replicas if engine.python else 0
        return engine.replicas if isinstance(engine, EmbeddedEngine) and engine.process == "own" else 0

    def gpus_of_engine(self) -> int:
        """That each of these takes, where there are any."""
        return self.engine.tensor_parallel if isinstance(self.engine, ServerEngine) else 1

    def weights_go_by(self) -> Literal["shared_memory", "broadcast", "disk"]:
        """How they reach engines that have their own copy of them."""
        engine, elsewhere = self.engine, isinstance(self.placement, RayPlacement)
        if isinstance(engine, ScriptedEngine):
            return "shared_memory"  # it has none
        if engine.publication:
            return engine.publication
        if isinstance(engine, EmbeddedEngine):
            return "broadcast" if elsewhere else "shared_memory"
        wants_folder = engine.url or engine.publication_folder or self._why_not_broadcast(engine)
        return "broadcast" if elsewhere and not wants_folder else "disk"

    def publishes_adapters(self) -> bool:
        """By themselves, to engines that have the weights under them."""
        return isinstance(self.engine, VllmEngine) and self.engine.lora == "adapter"

    def _why_not_broadcast(self, engine: ServerEngine) -> str:
        shares_gpus = isinstance(self.placement, RayPlacement) and self.placement.layout == "colocated"
        return engine.why_not_broadcast(shares_gpus)

    def idle_checks(self) -> dict[str, str]:
        """The checks that have nothing to look at in this run, and why."""
        idle: dict[str, str] = {}
        if self.engine.name == "scripted":
            why = "engine.name=scripted has no weights and says log-prob 0 for every token"
            idle |= {"weights_match": why, "first_update_ratio": why}
        if isinstance(self.engine, ServerEngine) and self.engine.quantization:
            idle["first_update_ratio"] = f"engine.quantization={self.engine.quantization} rounds the engine's weights"
        if self.trainer.name == "dry":
            idle |= dict.fromkeys(("padded_packed", "entropy"), "trainer.name=dry has no model")
        if self.rollout.group_size == 1:
            idle["equal_rewards"] = "rollout.group_size=1 makes the rewards of every group equal"
        return idle


class SftConfig(Section):
    """`sluice sft`"""

    run: SftRun = SftRun()
    model: ModelSection
    data: SftData
    trainer: SftTrainer = SftTrainer()

    @model_validator(mode="after")
    def _fits(self) -> SftConfig:
        self.trainer.check_schedule("trainer")
        self.trainer.check_adapters()
        return self


def reward_label(reward: AnyReward) -> str:
    return reward.label or reward.name.rpartition(":")[2]
