"""Metrics as small SVG curves that take their colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MAX_POINTS = 400
"""A curve of more steps is drawn as mean and range of equal shares of them: more points than pixels help nobody."""
MAX_DOTS = 40
"""Curves of so few points show each."""
NUM_COLOURS = 8
"""The page defines the variables --curve-1 … --curve-8."""

# matplotlib wants colours: these stand for variables of the page, which differ between light and dark
_COLOURS = {"#010203": "--muted", "#010204": "--line"} | {
    f"#0102{16 + i:02x}": f"--curve-{i + 1}" for i in range(NUM_COLOURS)
}
_MUTED, _LINE, *_CURVES = _COLOURS


@dataclass(frozen=True)
class Panel:
    """What is drawn together; `metrics` are names or patterns."""

    section: str
    title: str
    unit: str
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    name: str
    colour: int
    """--curve-N of the page."""
    latest: float | None


@dataclass(frozen=True)
class Drawing:
    section: str
    title: str
    curves: list[Curve]
    svg: str


PANELS = (
    Panel("Rollout", "Reward", "reward", ("rollout/reward", "rollout/reward/*")),
    Panel("Rollout", "Response length", "tokens", ("rollout/response_len/mean", "rollout/response_len/*")),
    Panel("Rollout", "Length limit, equal rewards", "share", ("rollout/finish/*", "rollout/equal_reward_groups")),
    Panel("Rollout", "Tokens sampled", "tokens per step", ("rollout/num_tokens",)),
    Panel("Rollout", "Not trained on", "per step", ("rollout/rejected_groups", "rollout/outcome/*")),
    Panel("Rollout", "Staleness", "versions", ("rollout/staleness/*",)),
    Panel("Training", "KL from the old policy", "nats per token", ("train/ppo_kl", "train/*/ppo_kl")),
    Panel("Training", "Clipped tokens", "share", ("train/pg_clipfrac", "train/*/pg_clipfrac")),
    Panel("Training", "Largest ratio", "ratio", ("train/ratio/max",)),
    Panel("Training", "Ratios by size", "share of tokens", ("train/ratio/share/*",)),
    Panel("Training", "Effective sample size", "share of tokens", ("train/ratio/ess", "train/mismatch/ess")),
    Panel("Training", "KL from the reference", "nats per token", ("train/ref_kl", "train/kl_loss")),
    Panel("Training", "Entropy", "nats per token", ("train/entropy",)),
    Panel("Training", "Gradient norm", "L2 norm", ("train/grad_norm",)),
    Panel("Training", "Loss", "loss", ("train/loss", "train/pg_loss")),
    Panel(
        "Training", "Trainer against engine", "nats", ("train/engine_logprob_diff/mean", "train/engine_logprob_diff/*")
    ),
    Panel("Training", "Engine from trainer, recomputed", "nats per token", ("train/mismatch/kl", "train/mismatch/k3")),
    Panel("Training", "Trainer / engine by size", "share of tokens", ("train/mismatch/share/*",)),
    Panel("Training", "Learning rate", "per update", ("train/learning_rate", "train/critic/learning_rate")),
    Panel("Critic", "Explained variance", "share", ("train/explained_variance",)),
    Panel("Critic", "Value loss", "loss", ("train/value_loss",)),
    Panel("Critic", "Clipped values", "share of tokens", ("train/value_clipfrac",)),
    Panel("Critic", "Gradient norm", "L2 norm", ("train/critic/grad_norm",)),
    Panel("Speed", "Tokens per second", "tokens/s", ("perf/tokens_per_s",)),
    Panel("Speed", "Time per step", "s", ("perf/step_s", "perf/*_s")),
)
"""Metrics that are in none of them get a panel of their own."""


def draw(steps: Sequence[int], metrics: Mapping[str, Sequence[float | None]], x_label: str) -> list[Drawing]:
    """A drawing for every panel that has a metric with a number; `metrics` has a value or None per step."""
    drawings = []
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sluice", "path.simplify": True}):
        for panel, names in _filled(PANELS, [name for name, values in metrics.items() if any_number(values)]):
            series = {name: np.array([np.nan if v is None else v for v in metrics[name]]) for name in names}
            curves = [
                Curve(name, i % NUM_COLOURS + 1, next((v for v in reversed(metrics[name]) if v is not None), None))
                for i, name in enumerate(names)
            ]
            svg = _svg(np.array(steps), list(series.values()), x_label, panel.unit)
            drawings.append(Drawing(panel.section, panel.title, curves, svg))
    return drawings


def any_number(values: Sequence[float | None]) -> bool:
    return any(value is not None for value in values)


def _filled(panels: Sequence[Panel], names: Sequence[str]) -> Iterator[tuple[Panel, list[str]]]:
    """Each panel with its metrics, in the order of its patterns, then panels for what is left, section by section."""
    left = dict.fromkeys(names)
    found: list[tuple[Panel, list[str]]] = []
    for panel in panels:
        mine = [name for pattern in panel.metrics for name in sorted(left) if fnmatchcase(name, pattern)]
        mine = list(dict.fromkeys(mine))
        left = {name: None for name in left if name not in mine}
        if mine:
            found.append((panel, mine))
    sections = {"rollout": "Rollout", "train": "Training", "perf": "Speed"}
    found += [(Panel(sections.get(name.split("/")[0], "Other"), name, "", ()), [name]) for name in left]
    order = ["Rollout", "Training", "Critic", "Speed", "Other"]
    yield from sorted(found, key=lambda entry: order.index(entry[0].section))


def _svg(steps: np.ndarray, curves: Sequence[np.ndarray], x_label: str, y_label: str) -> str:
    figure = Figure(figsize=(4.4, 2.5), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    for i, values in reversed(list(enumerate(curves))):  # the first is the panel's own, and lies on top
        _curve(axes, steps, values, _CURVES[i % NUM_COLOURS], 1.8 if i == 0 else 1.2)
    _flat(axes, np.unique(np.concatenate(curves)))
    axes.patch.set_alpha(0)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    axes.tick_params(length=0, labelsize=9, labelcolor=_MUTED)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=False)
    axes.yaxis.offsetText.set(color=_MUTED, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel(x_label, color=_MUTED, fontsize=9)
    axes.set_ylabel(y_label, color=_MUTED, fontsize=9)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _inline(out.getvalue())


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, width: float) -> None:
    if len(steps) > MAX_POINTS:
        shares = np.array_split(np.arange(len(steps)), MAX_POINTS)
        known = [share[~np.isnan(values[share])] for share in shares]
        low, mean, high = (
            np.array([pick(values[share]) if len(share) else np.nan for share in known])
            for pick in (np.min, np.mean, np.max)
        )
        steps, values = np.array([steps[share].mean() for share in shares]), mean
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    dots = {"marker": "o", "markersize": 3.5} if len(steps) <= MAX_DOTS else {}
    axes.plot(steps, values, color=colour, linewidth=width, **dots)


def _flat(axes: Axes, values: np.ndarray) -> None:
    """Where nothing varies, matplotlib would show the rounding of a constant; show where it is between 0 and its double."""
    known = values[~np.isnan(values)]
    if len(known) == 1:
        low, high = sorted((0.0, 2 * known[0] or 1.0))
        axes.set_ylim(low - 0.04 * (high - low), high)


def _inline(svg: str) -> str:
    """The drawing as part of an HTML page: no prologue, no namespaces, colours and font of the page."""
    svg = svg[svg.index("<svg") :]
    unwanted = (r'\s+xmlns(:\w+)?="[^"]*"', r"<style.*?</style>", r'(?<=<g) id="[^"]*"', r"font-family: [^;\"]*;")
    for pattern in unwanted:
        svg = re.sub(pattern, "", svg, flags=re.DOTALL)
    return re.sub(r"#0102[0-9a-f]{2}", lambda found: f"var({_COLOURS[found[0]]})", svg)
