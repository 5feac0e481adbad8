"""A config in plain words, without anything that takes time to load."""

from __future__ import annotations

from sluice.algorithms import Algorithm, explain, explain_unused, resolve
from sluice.config import CriticSection, DryTrainer, FsdpTrainer, ReferenceSection, TrainConfig
from sluice.configengines import ServerEngine
from sluice.configplacement import RayPlacement
from sluice.errors import ConfigError


def algorithm_of(config: TrainConfig) -> Algorithm:
    row = resolve(
        config.algorithm.name,
        config.algorithm.overrides(),
        max_new_tokens=config.rollout.max_new_tokens,
        group_size=config.rollout.group_size,
    )
    for wrong, why in _misfits(config, row):
        if wrong:
            raise ConfigError(why)
    return row


def _misfits(config: TrainConfig, row: Algorithm) -> list[tuple[bool, str]]:
    """What a row and the rest of the config cannot do together, or what one of them says for nothing."""
    recomputed, dry = config.algorithm.old_logprobs == "recomputed", config.trainer.name == "dry"
    return [
        (
            recomputed and row.ratio == "none" and not row.corrects and not row.kl_in_reward,
            "algorithm.old_logprobs=recomputed has no effect: only a ratio divides by old log-probs, and "
            f"algorithm {row.name} has none; leave it out, or set algorithm.ratio=token",
        ),
        (
            row.corrects and not recomputed,
            "algorithm: a correction or rejection compares the trainer's log-probs with the engine's, "
            "and with old_logprobs=engine the ratio divides by the engine's already; set algorithm.old_logprobs=recomputed",
        ),
        (
            row.credit == "turn" and config.rollout.environment == "single_turn",
            "algorithm.credit=turn has no effect with rollout.environment=single_turn, whose trajectories have one turn; leave it "
            "out, or name an environment",
        ),
        (
            row.corrects and config.engine.name == "scripted",
            "engine.name=scripted says log-prob 0 for every token, so a correction against it means nothing; leave "
            "algorithm.correction and rejection out",
        ),
        (
            bool(config.reference.changed()) and not row.needs_reference,
            f"reference.{min(config.reference.changed(), default='')} has no effect: only a KL term needs a reference; set "
            "algorithm.kl_coef above 0, or leave it out",
        ),
        (
            bool(config.critic.changed()) and not row.needs_values,
            f"critic.{min(config.critic.changed(), default='')} has no effect: only advantage: gae has a critic, and this is "
            f"advantage: {row.advantage}; set algorithm.name=ppo, or leave it out",
        ),
        (
            dry and (row.needs_reference or row.needs_values),
            "trainer.name=dry loads no model, so it has no reference and no critic; set algorithm.kl_coef=0 and another advantage "
            "than gae, or trainer.name=local",
        ),
    ]


def describe(config: TrainConfig) -> str:
    """The batch arithmetic in plain words, and the loss with its bounds."""
    rollout, trainer, row = config.rollout, config.trainer, algorithm_of(config)
    samples, updates = rollout.groups_per_step * rollout.group_size, trainer.updates_per_batch
    share = f"{samples // updates}" + (f" or {samples // updates + 1}" if samples % updates else "")
    cut = ""
    if not isinstance(trainer, DryTrainer):
        cut = f", in micro-batches of at most {trainer.tokens_per_micro_batch} tokens"
    behind = rollout.max_staleness
    age = f"at most {behind} version{'s' * (behind > 1)} old" if behind else "sampled by the newest weights"
    steps, places = config.run.num_steps, (("engines", _engines(config)), ("placement", _placement(config)))
    lines = [
        f"a step     {rollout.groups_per_step} groups × {rollout.group_size} samples = {samples} samples, {age}",
        f"           {updates} optimiser update{'s' * (updates > 1)}, each of {share} samples{cut}",
        f"the run    {steps} steps = {steps * samples} samples and {steps * updates} updates",
        *(f"{what:<11}{words}" for what, words in places if words),
        explain(row, config.algorithm.old_logprobs),
    ]
    if isinstance(trainer, FsdpTrainer):
        lines.insert(2, f"           {_ranks(trainer)}")
    if workers := rollout.environment_workers:
        lines.insert(1, f"           played in {workers} environment process{'es' * (workers > 1)}")
    if rollout.routing_replay:
        lines.append(
            "  experts    of each token are those that the engine chose, while the trainer's router weighs them"
        )
    if row.needs_values:
        lines.append(f"  critic     {_critic(config.critic)}")
    if row.needs_reference:
        lines.append(f"  reference  {_reference(config.reference)}")
    return "\n".join(lines)


def unused_settings(config: TrainConfig) -> str:
    """The settings of the algorithm that would have no effect, and are refused."""
    return explain_unused(algorithm_of(config))


def _ranks(trainer: FsdpTrainer) -> str:
    ways = trainer.tensor_parallel * trainer.context_parallel
    shared = f", of which {ways} share each micro-batch" if ways > 1 else ""
    return f"on {trainer.num_ranks} rank{'s' * (trainer.num_ranks > 1)}{shared}"


def _engines(config: TrainConfig) -> str:
    """Those with weights of their own, and how they get them; nothing of one in the trainer's process."""
    engine, count = config.engine, config.num_engines_apart()
    if isinstance(engine, ServerEngine):
        made = (
            f"{count} {engine.package} server{'s' * (count > 1)}"
            if count
            else f"the {engine.package} server at {engine.url}"
        )
        return f"{made}; weights go by {config.weights_go_by()}"
    where = "a process of its own" if count == 1 else "processes of their own"
    return f"{count} in {where}; weights go by {config.weights_go_by()}" if count else ""


def _placement(config: TrainConfig) -> str:
    placement = config.placement
    if not isinstance(placement, RayPlacement):
        return ""
    where = f"the cluster at {placement.address}" if placement.address else "this machine alone"
    return f"by Ray, {placement.layout}, {placement.strategy}, on {where}"


def _critic(critic: CriticSection) -> str:
    what = "a model of its own" if critic.model == "own" else "a head on the policy's hidden states"
    bounded = f", (clip(V, V_old ± {critic.value_clip:g}) - G)²" if critic.value_clip is not None else ""
    loss = f"½·max((V - G)²{bounded})" if bounded else "½·(V - G)²"
    alone = f"; the first {critic.pretrain_steps} steps train it alone" if critic.pretrain_steps else ""
    return f"{what}, learning rate {critic.learning_rate:g}; its loss is {loss}, G = A + V_old before whitening{alone}"


def _reference(reference: ReferenceSection) -> str:
    moves = (
        f"; the policy takes its place every {reference.update_every_steps} steps"
        if reference.update_every_steps
        else ""
    )
    return f"{reference.path or 'the policy as the run begins'}{moves}"
