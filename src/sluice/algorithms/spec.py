"""An algorithm is a row: advantage × ratio level × clip rule × mask × aggregation. Needs no torch.

A user starts from a row and changes a word; `resolve` refuses words that would have no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from sluice.errors import ConfigError


@dataclass(frozen=True)
class Algorithm:
    """One policy-gradient loss. Bounds that the words do not use are None."""

    name: str
    advantage: Literal["z_score", "centred", "raw"]
    ratio: Literal["token", "sequence", "none"]
    clip: Literal["surrogate", "weight", "none"]
    aggregation: Literal["token_mean", "sequence_mean", "constant"]
    mask: Literal["none", "trust_region"] = "none"
    std_eps: float | None = None
    """Added to the standard deviation of `z_score`."""
    clip_low: float | None = None
    """Trust region: ratio >= 1 - clip_low."""
    clip_high: float | None = None
    """Trust region: ratio <= 1 + clip_high."""
    ratio_min: float | None = None
    """Lower bound of the clipped weight, a ratio. No row has one: it would keep pushing tokens that the policy has left."""
    ratio_max: float | None = None
    """Upper bound of the clipped weight, a ratio and not a distance from 1: the paper's 1 + ε_high."""
    loss_constant: float | None = None
    """Divisor of `constant`, beside the number of sequences."""
    dynamic_sampling: bool = False
    """Groups whose rewards are all equal carry no gradient: reject them and sample others."""


def _table(*rows: Algorithm) -> Mapping[str, Algorithm]:
    return MappingProxyType({row.name: row for row in rows})


ALGORITHMS = _table(
    # MiniMax-M1 (arXiv 2506.13585), eq. 4-5
    Algorithm("cispo", "z_score", "token", "weight", "token_mean", std_eps=1e-6, ratio_max=5.0),
    # DeepSeekMath (arXiv 2402.03300), eq. 3, without its KL term
    Algorithm("grpo", "z_score", "token", "surrogate", "sequence_mean", std_eps=1e-6, clip_low=0.2, clip_high=0.2),
    # Understanding R1-Zero-Like Training (arXiv 2503.20783), section 3.2
    Algorithm("dr_grpo", "centred", "token", "surrogate", "constant", clip_low=0.2, clip_high=0.2),
    # GLM-4.5 (arXiv 2508.06471), section 3: group-centred advantages, no KL, token-mean loss
    Algorithm("glm", "centred", "token", "surrogate", "token_mean", clip_low=0.2, clip_high=0.2),
    # DAPO (arXiv 2503.14476), eq. 8-12
    Algorithm(
        "dapo",
        "z_score",
        "token",
        "surrogate",
        "token_mean",
        std_eps=1e-6,
        clip_low=0.2,
        clip_high=0.28,
        dynamic_sampling=True,
    ),
    # GSPO (arXiv 2507.18071), eq. 5-7
    Algorithm(
        "gspo",
        "z_score",
        "sequence",
        "surrogate",
        "sequence_mean",
        std_eps=1e-6,
        clip_low=3e-4,
        clip_high=4e-4,
    ),
    # Williams (Machine Learning 8, 1992), eq. 3, without a baseline
    Algorithm("reinforce", "raw", "none", "none", "token_mean"),
)

# Which words use which bound; the same table decides what is refused and what must be given.
_USERS: dict[str, tuple[str, Callable[[Algorithm], bool]]] = {
    "std_eps": ("advantage: z_score", lambda a: a.advantage == "z_score"),
    "clip_low": (
        "clip: surrogate or mask: trust_region",
        lambda a: a.clip == "surrogate" or a.mask != "none",
    ),
    "clip_high": (
        "clip: surrogate or mask: trust_region",
        lambda a: a.clip == "surrogate" or a.mask != "none",
    ),
    "ratio_min": ("clip: weight", lambda a: a.clip == "weight"),
    "ratio_max": ("clip: weight", lambda a: a.clip == "weight"),
    "loss_constant": ("aggregation: constant", lambda a: a.aggregation == "constant"),
}
_REQUIRED = {"std_eps": 1e-6, "clip_low": 0.2, "clip_high": 0.2, "ratio_max": 5.0}
"""What a bound is when a word that uses it replaces one that does not."""


def resolve(name: str, overrides: Mapping[str, Any], *, max_new_tokens: int, group_size: int) -> Algorithm:
    """The row `name` with some words changed.

    Raises ConfigError for an unknown row, for a bound that no word uses, and for words that exclude each other.
    """
    if name not in ALGORITHMS:
        raise ConfigError(f"algorithm.name={name!r} is not a row; the rows are {', '.join(ALGORITHMS)}")
    row = replace(ALGORITHMS[name], **overrides)
    for bound, (user, used) in _USERS.items():
        if used(row):
            if getattr(row, bound) is None and bound in _REQUIRED:
                row = replace(row, **{bound: _REQUIRED[bound]})
        elif bound in overrides:
            raise ConfigError(
                f"algorithm.{bound}={overrides[bound]} has no effect: only {user} uses it, and this is {_words(row)}"
            )
        else:
            row = replace(row, **{bound: None})
    if row.aggregation == "constant" and row.loss_constant is None:
        row = replace(row, loss_constant=float(max_new_tokens))
    _check(row, group_size)
    return row


def _check(row: Algorithm, group_size: int) -> None:
    if row.ratio == "none" and row.clip != "none":
        raise ConfigError(
            f"algorithm: ratio none leaves clip: {row.clip} nothing to bound; set clip: none, or ratio: token"
        )
    if row.ratio == "none" and row.mask != "none":
        raise ConfigError(
            "algorithm: ratio none leaves mask: trust_region nothing to look at; set mask: none, or ratio: token"
        )
    if row.clip == "surrogate" and row.mask == "trust_region":
        raise ConfigError(
            "algorithm: clip surrogate already drops the gradient of the tokens that mask: trust_region drops; set mask: none, or clip: weight"
        )
    if row.ratio_max is not None and row.ratio_max <= 1:
        raise ConfigError(
            f"algorithm.ratio_max={row.ratio_max} bounds the ratio itself, which is 1 on fresh samples, so it would clip "
            f"every token; if it is a distance from 1, set ratio_max={1 + row.ratio_max:g}"
        )
    if row.dynamic_sampling and row.advantage == "raw":
        raise ConfigError(
            "algorithm.dynamic_sampling rejects groups of equal rewards because their advantages are 0, and with "
            "advantage raw they are not; set algorithm.advantage=centred, or dynamic_sampling=false"
        )
    if row.ratio_min is not None and row.ratio_max is not None and row.ratio_min >= row.ratio_max:
        raise ConfigError(f"algorithm.ratio_min={row.ratio_min} must be below algorithm.ratio_max={row.ratio_max}")
    if group_size == 1 and row.advantage != "raw":
        raise ConfigError(
            f"algorithm.advantage={row.advantage} compares the samples of a group, and rollout.group_size=1 leaves nothing to "
            "compare: every advantage would be 0; raise rollout.group_size, or set algorithm.advantage=raw"
        )


def _words(row: Algorithm) -> str:
    return (
        f"advantage {row.advantage}, ratio {row.ratio}, clip {row.clip}, mask {row.mask}, aggregation {row.aggregation}"
    )


def explain(row: Algorithm, old_logprobs: str) -> str:
    """The loss that `row` stands for as plain text: formula, bounds as ratio intervals, and what divides by what."""
    advantage = {
        "z_score": f"(R - mean of the group) / (std of the group, ddof 1, + {row.std_eps or 0:g})",
        "centred": "R - mean of the group",
        "raw": "R",
    }[row.advantage]
    old = {
        "engine": "the engine's log-probs",
        "recomputed": "the trainer's own log-probs before the step's first update",
    }
    ratio = {
        "token": "r_t = exp(logπ_t - logπ_old_t), one per token",
        "sequence": "r = exp(mean over the response of logπ_t - logπ_old_t), one per sequence, shared by its tokens",
        "none": "none: the samples are taken to be on-policy",
    }[row.ratio]
    lines = [
        f"algorithm {row.name}: {_words(row)}",
        f"  loss       J = {_divisor(row)} of {_term(row)}; the loss is -J",
    ]
    lines += [f"  advantage  A = {advantage}", f"  ratio      {ratio}"]
    if row.ratio != "none":
        lines.append(f"  π_old      {old[old_logprobs]}")
    lines += [f"  bounds     {_bounds(row)}"]
    if row.dynamic_sampling:
        lines.append("  sampling   groups whose rewards are all equal are rejected and replaced")
    return "\n".join(lines)


def _term(row: Algorithm) -> str:
    mask = "·M_t" if row.mask == "trust_region" else ""
    if row.clip == "surrogate":
        return f"min(r·A, clip(r, {_interval(row.clip_low, row.clip_high)})·A)"
    if row.clip == "weight":
        return f"stop_gradient(clip(r, {row.ratio_min or 0:g}, {row.ratio_max:g}))·A·logπ_t{mask}"
    return f"A·logπ_t{mask}" if row.ratio == "none" else f"stop_gradient(r)·A·logπ_t{mask}"


def _interval(low: float | None, high: float | None) -> str:
    return f"{1 - (low or 0):.6g}, {1 + (high or 0):.6g}"


def _bounds(row: Algorithm) -> str:
    trust = f"[{_interval(row.clip_low, row.clip_high)}]"
    parts: list[str] = []
    if row.clip == "surrogate":
        parts.append(f"no gradient above {trust} when A > 0, none below it when A < 0")
    if row.clip == "weight":
        parts.append(
            f"ratio in [{row.ratio_min or 0:g}, {row.ratio_max:g}]; a clipped token keeps its gradient, with the bound as weight"
        )
    if row.mask == "trust_region":
        parts.append(f"M_t = 0 above {trust} when A > 0 and below it when A < 0, else 1")
    return "; ".join(parts) or "none"


def _divisor(row: Algorithm) -> str:
    return {
        "token_mean": "mean over all loss tokens of the update",
        "sequence_mean": "mean over sequences of the mean over each one's loss tokens",
        "constant": f"1 / (sequences × {row.loss_constant or 0:g}) times the sum over all loss tokens",
    }[row.aggregation]
