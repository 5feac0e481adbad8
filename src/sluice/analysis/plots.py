"""The figures of `sluice analyze` as PNG or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sluice.tracking.rundir import write_atomically

if TYPE_CHECKING:  # binary_reward loads torch, which clipped tokens do without
    from sluice.analysis.binary_reward import BinaryReward
    from sluice.analysis.clipped_tokens import Pool


def draw_binary_reward(result: BinaryReward, path: Path) -> None:
    """Amplification, and the shares of the gradient norm, over the success rate."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    factors, shares = figure.subplots(1, 2)
    rates = [r.rate for r in result.rates]
    factors.plot(rates, [r.amplification for r in result.rates], marker="o", label="z-score / centred")
    factors.plot(rates, [r.relative for r in result.rates], marker="o", label="relative to the even group")
    shares.plot(rates, [r.z_score_share for r in result.rates], marker="o", label="z-score")
    shares.plot(rates, [r.centred_share for r in result.rates], marker="o", label="centred")
    shares.yaxis.set_major_formatter(PercentFormatter(1))
    for axes, title in ((factors, "Amplification of the gradient"), (shares, "Share of the gradient norm, sqrt(ΣA²)")):
        axes.set(title=title, xlabel=f"success rate in a group of {result.group_size}", xlim=(0, 1))
        axes.set_ylim(bottom=0)
        _finish(axes)
    _save(figure, path)


def draw_clipped_tokens(pools: Sequence[Pool], top: int, path: Path) -> None:
    """The tokens clipped most often of each algorithm, and the shares by update of all."""
    rows = max((len(pool.tokens[:top]) for pool in pools), default=0)
    figure = Figure(figsize=(4 * (len(pools) + 1), max(3.5, 1.5 + 0.22 * rows)), layout="constrained")
    *bars, updates = figure.subplots(1, len(pools) + 1, squeeze=False)[0]
    for i, (axes, pool) in enumerate(zip(bars, pools)):
        tokens = pool.tokens[:top]
        axes.barh(range(len(tokens)), [token.total.share for token in tokens], color=f"C{i}")
        # no font has the characters of all tokens; and a token may hold a $, which would start a formula
        axes.set_yticks(range(len(tokens)), [ascii(token.token) for token in tokens], parse_math=False)
        axes.invert_yaxis()
        axes.set_title(pool.algorithm, parse_math=False)
        axes.set_xlabel("clipped share of the token")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.set_xlim(left=0)
    for pool in pools:
        shares = [clipping.share for clipping in pool.by_update.values()]
        updates.plot(list(pool.by_update), shares, marker="o", label=pool.algorithm)
    updates.set(title="All loss tokens", xlabel="update of the step", ylabel="clipped share")
    updates.xaxis.set_major_locator(MaxNLocator(integer=True))
    updates.yaxis.set_major_formatter(PercentFormatter(1))
    updates.set_ylim(bottom=0)
    _finish(updates)
    _save(figure, path)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _save(figure: Figure, path: Path) -> None:
    """As the format that the file's name ends in. The same figures give the same file: no date, no random ids."""
    format = path.suffix.removeprefix(".").lower()
    metadata = {"Date": None} if format == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "sluice"}):
        write_atomically(path, lambda file: figure.savefig(file, format=format, dpi=150, metadata=metadata))
