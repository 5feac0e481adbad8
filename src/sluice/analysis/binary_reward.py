"""Z-score against centred advantages under 0/1 rewards: what each success rate of a group weighs in the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sluice.algorithms import compute_advantages, resolve
from sluice.errors import ConfigError


@dataclass(frozen=True)
class Rate:
    """Groups with `num_right` right answers."""

    num_right: int
    rate: float
    z_score_right: float
    """Advantage of a right answer."""
    z_score_wrong: float
    centred_right: float
    centred_wrong: float
    amplification: float
    """Z-score over centred advantage: 1 / (standard deviation of the rewards + std_eps)."""
    relative: float
    """Amplification over that of the most even group."""
    z_score_share: float
    """Share of the gradient norm among the rates listed, with sqrt(ΣA²) for the norm of a group."""
    centred_share: float


@dataclass(frozen=True)
class BinaryReward:
    group_size: int
    rates: list[Rate]
    notes: list[str]
    """Which of the rates asked for were rounded, and to what."""


def default_rates(group_size: int) -> list[float]:
    """The nine eighths from 0 to 1, whose ends, where no group has a gradient, are moved to one right and one wrong."""
    return [1 / group_size, *(i / 8 for i in range(1, 8)), 1 - 1 / group_size]


def analyse(group_size: int, rates: Sequence[float] | None = None) -> BinaryReward:
    """The figures for each rate, in order. Raises ConfigError for a group of one, or a rate that is none."""
    if group_size < 2:
        raise ConfigError(f"--group-size {group_size}: advantages compare the samples of a group; give at least 2")
    asked = default_rates(group_size) if rates is None else rates
    for rate in asked:
        if not 0 <= rate <= 1:
            raise ConfigError(
                f"--rates {rate:g}: a success rate lies between 0 and 1; for {rate:g} % give {rate / 100:g}"
            )
    rounded: dict[int, list[float]] = {}
    for rate in sorted(asked):
        rounded.setdefault(min(max(round(rate * group_size), 1), group_size - 1), []).append(rate)
    return BinaryReward(group_size, list(_rates(group_size, list(rounded))), list(_notes(group_size, rounded)))


def _notes(group_size: int, rounded: dict[int, list[float]]) -> Iterator[str]:
    for num_right, rates in rounded.items():
        group = f"{num_right} of {group_size} = {num_right / group_size:g}"
        for rate in rates:
            if abs(rate - num_right / group_size) > 1e-9:
                yield f"a rate of {rate:g} is taken as {group}"
        if len(rates) > 1:
            yield f"{len(rates)} of the rates are {group}, which is listed once"


def _rates(group_size: int, rights: list[int]) -> Iterator[Rate]:
    z_score, centred = (_advantages(group_size, [*rights, group_size // 2], row) for row in ("grpo", "dr_grpo"))
    *amplifications, even = (z_score / centred)[:, 0].tolist()
    z_shares, centred_shares = _shares(z_score[:-1]), _shares(centred[:-1])
    for i, num_right in enumerate(rights):
        yield Rate(
            num_right=num_right,
            rate=num_right / group_size,
            z_score_right=z_score[i, 0].item(),
            z_score_wrong=z_score[i, -1].item(),
            centred_right=centred[i, 0].item(),
            centred_wrong=centred[i, -1].item(),
            amplification=amplifications[i],
            relative=amplifications[i] / even,
            z_score_share=z_shares[i],
            centred_share=centred_shares[i],
        )


def _advantages(group_size: int, rights: Sequence[int], row: str) -> Tensor:
    """[groups, group_size] advantages, those of right answers first."""
    rewards = torch.tensor([[1.0] * k + [0.0] * (group_size - k) for k in rights], dtype=torch.float64)
    groups = torch.arange(len(rights)).repeat_interleave(group_size)
    spec = resolve(row, {}, max_new_tokens=1, group_size=group_size)
    return compute_advantages(rewards.flatten(), groups, spec).view_as(rewards)


def _shares(advantages: Tensor) -> list[float]:
    """Each group's share of the gradient norm: sqrt(ΣA²), as if its responses had orthogonal gradients of one length."""
    norms = advantages.square().sum(1).sqrt()
    return (norms / norms.sum()).tolist()


def show(result: BinaryReward) -> Iterator[RenderableType]:
    """What the command prints."""
    table = Table(title=f"0/1 rewards, groups of {result.group_size}")
    heads = ("right", "rate", "z-score\nright", "\nwrong", "centred\nright", "\nwrong", "z-score /\ncentred")
    for head in (*heads, "relative\nto even", "share\nz-score", "share\ncentred"):
        table.add_column(head, justify="right", no_wrap=True)
    for r in result.rates:
        advantages = (f"{a:.3f}" for a in (r.z_score_right, r.z_score_wrong, r.centred_right, r.centred_wrong))
        factors = (f"{r.amplification:.2f}", f"{r.relative:.2f}", f"{r.z_score_share:.1%}", f"{r.centred_share:.1%}")
        table.add_row(str(r.num_right), f"{r.rate:.4g}", *advantages, *factors)
    yield table
    yield Text(
        "z-score / centred: by what the z-score multiplies a group's gradient, 1 / (std + 1e-6), ddof 1; relative to even: "
        f"over that factor at {result.group_size // 2} right.\n"
        "share: of the gradient norm among the rates listed, each as often as the others: sqrt(ΣA²) of a group over the "
        "sum of these. It takes the gradients of responses as orthogonal and of one length."
    )
    yield from (Text(f"note: {note}") for note in result.notes)
