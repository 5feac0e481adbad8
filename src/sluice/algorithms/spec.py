"""An algorithm is a row: advantage × ratio level × clip rule × mask × aggregation × KL × correction. Needs no torch.

A user starts from a row and changes a word; `resolve` refuses words that would have no effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sluice.errors import ConfigError


@dataclass(frozen=True)
class Algorithm:
    """One policy-gradient loss. Settings that the words do not use are None."""

    name: str
    advantage: Literal["z_score", "centred", "leave_one_out", "raw", "gae"]
    ratio: Literal["token", "sequence", "none"]
    clip: Literal["surrogate", "weight", "soft_gate", "none"]
    aggregation: Literal["token_mean", "sequence_mean", "prompt_mean", "constant", "blend"]
    mask: Literal["none", "trust_region", "tv"] = "none"
    normalise: Literal["none", "batch_std", "whiten"] = "none"
    """What is done to the advantages of the whole batch."""
    credit: Literal["trajectory", "turn"] = "trajectory"
    """Whether a turn is worth the whole trajectory's reward, or its own and that of the turns after it."""
    std_eps: float | None = None
    """Added to the standard deviation of `z_score` and `batch_std`."""
    std_ddof: int | None = None
    """What the sums of squares are divided by: their number minus this."""
    gamma: float | None = None
    """Discount per token of `gae`, and per turn of `credit: turn`."""
    gae_lambda: float | None = None
    clip_low: float | None = None
    """Trust region: ratio >= 1 - clip_low."""
    clip_high: float | None = None
    """Trust region: ratio <= 1 + clip_high."""
    dual_clip: float | None = None
    """Bound of the ratio where the advantage is negative, above which the surrogate has no gradient; 0 is None."""
    ratio_min: float | None = None
    """Lower bound of the clipped weight, a ratio. No row has one: it would keep pushing tokens that the policy has left."""
    ratio_max: float | None = None
    """Upper bound of the clipped weight, a ratio and not a distance from 1: the paper's 1 + ε_high."""
    gate_positive: float | None = None
    """Temperature of the soft gate where the advantage is positive."""
    gate_negative: float | None = None
    """And where it is not."""
    tv_low: float | None = None
    """How far the probability of a token with a negative advantage may fall."""
    tv_high: float | None = None
    """How far the probability of a token with a positive advantage may rise."""
    loss_constant: float | None = None
    """Divisor of `constant`, beside the number of sequences."""
    token_share: float | None = None
    """Share of the token mean in `blend`; the rest is the sequence mean."""
    kl_coef: float = 0.0
    """Weight of the divergence from the reference policy; 0 needs no reference."""
    kl: Literal["loss", "reward"] | None = "loss"
    kl_estimator: Literal["k1", "k2", "k3", "k1_st", "k3_st"] | None = "k3"
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    correction: Literal["none", "tis", "mis", "icepop"] = "none"
    """Weight that corrects for the engine having sampled with other log-probs than the trainer's."""
    correction_level: Literal["token", "sequence", "geometric"] | None = None
    correction_min: float | None = None
    correction_max: float | None = None
    rejection: Literal["none", "sequence", "geometric"] = "none"
    """Drops whole sequences whose correction ratio lies outside of bounds."""
    rejection_min: float | None = None
    rejection_max: float | None = None
    dynamic_sampling: bool = False
    """Groups whose rewards are all equal carry no gradient: reject them and sample others."""

    @property
    def compares_group(self) -> bool:
        """Whether advantages compare the samples of a group, so that one sample alone has none."""
        return self.advantage in ("z_score", "centred", "leave_one_out")

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def kl_in_loss(self) -> bool:
        return self.needs_reference and self.kl == "loss"

    @property
    def kl_in_reward(self) -> bool:
        return self.needs_reference and self.kl == "reward"

    @property
    def needs_values(self) -> bool:
        return self.advantage == "gae"

    @property
    def couples_tokens(self) -> bool:
        """Whether a token's loss depends on the other tokens of its sequence, which can then not be cut."""
        levels = (self.ratio, self.correction_level, self.rejection)
        return "sequence" in levels or "geometric" in levels

    @property
    def corrects(self) -> bool:
        """Whether it compares the trainer's log-probs before the step with the engine's."""
        return self.correction != "none" or self.rejection != "none"


@dataclass(frozen=True)
class _Setting:
    """A setting that only some words use."""

    user: str
    used: Callable[[Algorithm], bool]
    default: Callable[[Algorithm], Any] | Any = None
    """What it is when a word that uses it replaces one that does not; None where it stays away."""


def _trusts(a: Algorithm) -> bool:
    return a.clip == "surrogate" or a.mask == "trust_region"


def _default_of_correction(a: Algorithm) -> float:
    return 5.0 if a.correction == "icepop" else 2.0


_CLIP_USER = "clip: surrogate or mask: trust_region"
_CORRECTION_USER = "correction: tis, mis or icepop"
_REJECTION_USER = "rejection: sequence or geometric"
# The same table decides what is refused and what must be given.
SETTINGS: Mapping[str, _Setting] = {
    "std_eps": _Setting(
        "advantage: z_score or normalise: batch_std",
        lambda a: a.advantage == "z_score" or a.normalise == "batch_std",
        1e-6,
    ),
    "std_ddof": _Setting(
        "advantage: z_score or normalise", lambda a: a.advantage == "z_score" or a.normalise != "none", 1
    ),
    "gamma": _Setting("advantage: gae or credit: turn", lambda a: a.needs_values or a.credit == "turn", 1.0),
    "gae_lambda": _Setting("advantage: gae", lambda a: a.needs_values, 1.0),
    "clip_low": _Setting(_CLIP_USER, _trusts, 0.2),
    "clip_high": _Setting(_CLIP_USER, _trusts, 0.2),
    "dual_clip": _Setting("clip: surrogate", lambda a: a.clip == "surrogate"),
    "ratio_min": _Setting("clip: weight", lambda a: a.clip == "weight"),
    "ratio_max": _Setting("clip: weight", lambda a: a.clip == "weight", 5.0),
    "gate_positive": _Setting("clip: soft_gate", lambda a: a.clip == "soft_gate", 1.0),
    "gate_negative": _Setting("clip: soft_gate", lambda a: a.clip == "soft_gate", 1.05),
    "tv_low": _Setting("mask: tv", lambda a: a.mask == "tv", 0.15),
    "tv_high": _Setting("mask: tv", lambda a: a.mask == "tv", 0.15),
    "loss_constant": _Setting("aggregation: constant", lambda a: a.aggregation == "constant"),
    "token_share": _Setting("aggregation: blend", lambda a: a.aggregation == "blend", 0.5),
    "kl": _Setting("kl_coef above 0", lambda a: a.needs_reference),
    "kl_estimator": _Setting("kl_coef above 0", lambda a: a.needs_reference),
    "correction_level": _Setting(_CORRECTION_USER, lambda a: a.correction != "none", "token"),
    "correction_max": _Setting(_CORRECTION_USER, lambda a: a.correction != "none", _default_of_correction),
    "correction_min": _Setting(
        "correction: mis or icepop",
        lambda a: a.correction in ("mis", "icepop"),
        lambda a: 0.5 if a.correction == "icepop" else None,
    ),
    "rejection_min": _Setting(
        _REJECTION_USER, lambda a: a.rejection != "none", lambda a: 0.99 if a.rejection == "geometric" else 0.5
    ),
    "rejection_max": _Setting(
        _REJECTION_USER, lambda a: a.rejection != "none", lambda a: 1.01 if a.rejection == "geometric" else 2.0
    ),
}


def _table(*rows: Algorithm) -> Mapping[str, Algorithm]:
    return MappingProxyType({row.name: _filled(row) for row in rows})


def _filled(row: Algorithm) -> Algorithm:
    """The row with the default of each setting that its words use and that it leaves open."""
    for key, setting in SETTINGS.items():
        if setting.used(row) and getattr(row, key) is None:
            default = setting.default
            row = replace(row, **{key: default(row) if callable(default) else default})
    return row


_PPO_BOUNDS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2}

ALGORITHMS = _table(
    # MiniMax-M1 (arXiv 2506.13585), eq. 4-5
    Algorithm("cispo", "z_score", "token", "weight", "token_mean", ratio_max=5.0),
    # DeepSeekMath (arXiv 2402.03300), eq. 3, without its KL term
    Algorithm("grpo", "z_score", "token", "surrogate", "sequence_mean", **_PPO_BOUNDS),
    # Understanding R1-Zero-Like Training (arXiv 2503.20783), section 3.2
    Algorithm("dr_grpo", "centred", "token", "surrogate", "constant", **_PPO_BOUNDS),
    # GLM-4.5 (arXiv 2508.06471), section 3: group-centred advantages, no KL, token-mean loss
    Algorithm("glm", "centred", "token", "surrogate", "token_mean", **_PPO_BOUNDS),
    # DAPO (arXiv 2503.14476), eq. 8-12
    Algorithm(
        "dapo", "z_score", "token", "surrogate", "token_mean", clip_low=0.2, clip_high=0.28, dynamic_sampling=True
    ),
    # GSPO (arXiv 2507.18071), eq. 5-7
    Algorithm("gspo", "z_score", "sequence", "surrogate", "sequence_mean", clip_low=3e-4, clip_high=4e-4),
    # MiniMax-M1, eq. 6-7: CISPO with PPO's trust region as a mask
    Algorithm("unified", "z_score", "token", "weight", "token_mean", "trust_region", ratio_max=5.0, **_PPO_BOUNDS),
    # Soft Adaptive Policy Optimization (arXiv 2511.20347)
    Algorithm("sapo", "z_score", "token", "soft_gate", "sequence_mean", gate_positive=1.0, gate_negative=1.05),
    # Rethinking the Trust Region in LLM RL (arXiv 2602.04879), Binary-TV; the rest of the row as in verl's example of it
    Algorithm("dppo", "centred", "token", "none", "constant", "tv", tv_low=0.15, tv_high=0.15),
    # Williams (Machine Learning 8, 1992), without a baseline
    Algorithm("reinforce", "raw", "none", "none", "token_mean"),
    # Back to Basics (arXiv 2402.14740): the log-prob of a response is the sum over its tokens
    Algorithm("rloo", "leave_one_out", "none", "none", "constant", loss_constant=1.0, kl="reward", kl_estimator="k1"),
    # REINFORCE++ (arXiv 2501.03262), and its variant with a group baseline
    Algorithm(
        "reinforce_pp",
        *("raw", "token", "surrogate", "token_mean"),
        normalise="whiten",
        kl="reward",
        kl_estimator="k1",
        **_PPO_BOUNDS,
    ),
    Algorithm(
        "reinforce_pp_baseline",
        *("centred", "token", "surrogate", "token_mean"),
        normalise="whiten",
        kl_estimator="k2",
        **_PPO_BOUNDS,
    ),
    # PPO (arXiv 1707.06347), eq. 7, with GAE (arXiv 1506.02438), eq. 16, and dual clip (arXiv 1912.09729), eq. 5
    Algorithm(
        "ppo",
        *("gae", "token", "surrogate", "token_mean"),
        normalise="whiten",
        dual_clip=3.0,
        kl="reward",
        kl_estimator="k1",
        **_PPO_BOUNDS,
    ),
)


def resolve(
    name: str,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    *,
    max_new_tokens: int | None = None,
    group_size: int | None = None,
) -> Algorithm:
    """The row `name` with some words changed.

    `max_new_tokens` is what `aggregation: constant` divides by where no loss_constant is given, `group_size` is for refusing
    what a group of one cannot have. Raises ConfigError for an unknown row or word, for a setting that no word uses, and for
    words that exclude each other.
    """
    if name not in ALGORITHMS:
        raise ConfigError(f"algorithm.name={name!r} is not a row; the rows are {', '.join(ALGORITHMS)}")
    known = {field.name for field in fields(Algorithm)} - {"name"}
    for unknown in overrides.keys() - known:
        raise ConfigError(f"algorithm.{unknown} is not a word; the words are {', '.join(sorted(known))}")
    for key, value in overrides.items():
        if why := _why_no_value(key, value):
            raise ConfigError(f"algorithm.{key}={value!r}: {why}")
    row = replace(ALGORITHMS[name], **overrides)
    if row.dual_clip == 0:
        row = replace(row, dual_clip=None)
    if overrides.get("kl") == "reward" and "kl_estimator" not in overrides and ALGORITHMS[name].kl != "reward":
        row = replace(row, kl_estimator="k1")  # the other rows' estimators are for the loss, where k1 has no gradient
    for key, setting in SETTINGS.items():
        if not setting.used(row):
            if key in overrides:
                raise ConfigError(
                    f"algorithm.{key}={overrides[key]} has no effect: only {setting.user} uses it, and this is {words(row)}"
                )
            row = replace(row, **{key: None})
    row = _filled(row)
    if row.aggregation == "constant" and row.loss_constant is None:
        if max_new_tokens is None:
            raise ConfigError(
                "algorithm.aggregation=constant needs algorithm.loss_constant: the longest response in tokens"
            )
        row = replace(row, loss_constant=float(max_new_tokens))
    if row.needs_values and "credit" in overrides:
        raise ConfigError(
            "algorithm.credit has no effect: advantage gae gives each token the rewards of its turn and the later ones by itself; "
            "leave it out"
        )
    for why in _objections(row, group_size):
        raise ConfigError(why)
    return row


_SHARES = {"gamma", "gae_lambda", "token_share", "clip_low", "tv_low", "tv_high"}


def _why_no_value(key: str, value: Any) -> str:
    """Why a word cannot have this value; empty when it can. The config says the same of its keys, and before it comes here."""
    choices = [choice for kind in _kinds(key) for choice in get_args(kind)]
    if choices:
        return "" if value in choices or value is None else f"should be {' or '.join(map(str, choices))}"
    if key == "dynamic_sampling":
        return "" if isinstance(value, bool) else "should be True or False"
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        return "should be a finite number of at least 0"
    highest = 1 if key in _SHARES or key == "std_ddof" else math.inf
    return f"should be at most {highest}" if value > highest else ""


def _kinds(key: str) -> list[Any]:
    """The Literals among what a field may be."""
    kind = get_type_hints(Algorithm)[key]
    return [option for option in (kind, *get_args(kind)) if get_origin(option) is Literal]


def words(row: Algorithm) -> str:
    """The choices of a row: the five of every row, and those beyond them that it makes."""
    parts = ["advantage", "ratio", "clip", "mask", "aggregation"]
    defaults = {"normalise": "none", "credit": "trajectory", "correction": "none", "rejection": "none"}
    parts += [part for part, default in defaults.items() if getattr(row, part) != default]
    kl = [f"kl {row.kl} {row.kl_estimator}"] if row.needs_reference else []
    return ", ".join([f"{part} {getattr(row, part)}" for part in parts] + kl)


def _objections(row: Algorithm, group_size: int | None) -> list[str]:
    """Why the words cannot work together, and what to set instead."""
    return [f"algorithm: {why}" for wrong, why in _rules(row) if wrong] + _bound_objections(row, group_size)


def _rules(row: Algorithm) -> list[tuple[bool, str]]:
    unratioed, gae = row.ratio == "none", row.needs_values
    return [
        (
            unratioed and row.clip != "none",
            f"ratio none leaves clip: {row.clip} nothing to bound; set clip: none, or ratio: token",
        ),
        (
            unratioed and row.mask != "none",
            f"ratio none leaves mask: {row.mask} nothing to look at; set mask: none, or ratio: token",
        ),
        (
            row.clip == "surrogate" and row.mask == "trust_region",
            "clip surrogate already drops the gradient of the tokens that mask: trust_region drops; set mask: none, or clip: weight",
        ),
        (
            row.dynamic_sampling and not row.compares_group,
            "dynamic_sampling rejects groups of equal rewards because their advantages are 0, and with "
            f"advantage {row.advantage} they are not; set algorithm.advantage=centred, or dynamic_sampling=false",
        ),
        (
            row.dynamic_sampling and (row.kl_in_reward or row.normalise == "whiten"),
            "dynamic_sampling rejects groups of equal rewards because their advantages are 0, and with "
            f"{'kl: reward' if row.kl_in_reward else 'normalise: whiten'} they are not; set dynamic_sampling=false",
        ),
        (
            gae and row.normalise == "batch_std",
            "normalise batch_std divides one number per response, and advantage gae has one per token; set normalise: whiten",
        ),
        (
            row.advantage == "raw" and row.kl_in_reward and row.normalise == "batch_std",
            "normalise batch_std divides one number per response, and advantage raw with KL in the reward has one per token; "
            "set normalise: whiten",
        ),
        (
            row.kl_in_reward and row.kl_estimator in ("k1_st", "k3_st"),
            f"kl_estimator {row.kl_estimator} differs from {str(row.kl_estimator)[:2]} by its gradient only, and kl: reward takes none; "
            f"set kl_estimator: {str(row.kl_estimator)[:2]}, or kl: loss",
        ),
    ]


def _bound_objections(row: Algorithm, group_size: int | None) -> list[str]:
    found: list[str] = []
    if row.ratio_max is not None and row.ratio_max <= 1:
        found.append(
            f"algorithm.ratio_max={row.ratio_max} bounds the ratio itself, which is 1 on fresh samples, so it would clip "
            f"every token; if it is a distance from 1, set ratio_max={1 + row.ratio_max:g}"
        )
    if row.dual_clip is not None and row.dual_clip <= 1:
        found.append(
            f"algorithm.dual_clip={row.dual_clip} bounds the ratio itself where the advantage is negative, and must be above 1"
        )
    for key, wrong in (
        ("correction_max", lambda bound: bound < 1),
        ("correction_min", lambda bound: bound > 1),
        ("rejection_max", lambda bound: bound < 1),
        ("rejection_min", lambda bound: bound > 1),
    ):
        bound = getattr(row, key)
        if bound is not None and wrong(bound):
            found.append(
                f"algorithm.{key}={bound} bounds trainer / engine, which is 1 where the two agree, so it would act on every token; "
                "keep 1 within the bounds"
            )
    if row.ratio_min is not None and row.ratio_max is not None and row.ratio_min >= row.ratio_max:
        found.append(f"algorithm.ratio_min={row.ratio_min} must be below algorithm.ratio_max={row.ratio_max}")
    if group_size == 1 and row.compares_group:
        found.append(
            f"algorithm.advantage={row.advantage} compares the samples of a group, and rollout.group_size=1 leaves nothing to "
            "compare: every advantage would be 0; raise rollout.group_size, or set algorithm.advantage=raw"
        )
    return found
