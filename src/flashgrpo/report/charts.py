"""The charts of the report: matplotlib draws, inline SVG comes back.

Nothing of matplotlib's look is left in the result. The colours used here are stand-ins for CSS variables of the page,
so that one drawing serves the light and the dark scheme; text takes the font of the page. Titles are the page's
business: they come from the user (names of rewards), and HTML wraps and escapes them better than a drawing does.
A chart without a single finite value is the empty string.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from flashgrpo.report.record import Row, Values, bounds, column, names

ROLES = ("currentColor", *(f"var(--{role})" for role in ("muted", "grid", "training", "evaluated", "watched", "fall")))
STAND_INS = tuple(
    f"#0000{i:02x}" for i in range(1, len(ROLES) + 1)
)  # black itself is left out of an SVG, being the default
INK, MUTED, GRID, TRAINING, EVALUATED, WATCHED, FALL = STAND_INS
PHASES = tuple(f"#0001{i:02x}" for i in range(8))
CSS = {**dict(zip(STAND_INS, ROLES, strict=True)), **{colour: f"var(--phase-{i})" for i, colour in enumerate(PHASES)}}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.left": False,
    "ytick.labelcolor": MUTED,
    "lines.solid_capstyle": "round",
}
NICE = [1, 2, 2.5, 5, 10]  # distances of ticks, times a power of ten
MOST_POINTS = 240  # longer runs are drawn as means over bins of equal length, metrics with their extremes


def bin_size(count: int) -> int:
    """Return how many of so many updates become one point."""
    return max(1, -(-count // MOST_POINTS))


def extremes(series: Values) -> tuple[Values, Values]:
    """Return the lowest and the highest value of each bin of `binned`; nan where it has none."""
    size = bin_size(len(series))
    padded = np.append(series, np.full(-len(series) % size, np.nan)).reshape(-1, size)
    finite = np.isfinite(padded)
    ends_of = np.where(finite, padded, np.inf).min(axis=1), np.where(finite, padded, -np.inf).max(axis=1)
    return tuple(np.where(finite.any(axis=1), end, np.nan) for end in ends_of)  # type: ignore[return-value]


def binned(*series: Values) -> list[Values]:
    """Return each series at no more than MOST_POINTS points; nan is left out of the means."""
    size = bin_size(len(series[0]))
    if size == 1:
        return list(series)
    padded = (np.append(s, np.full(-len(s) % size, np.nan)).reshape(-1, size) for s in series)
    counts_and_sums = ((np.isfinite(s).sum(axis=1), np.nansum(s, axis=1)) for s in padded)
    return [np.where(n > 0, total / np.maximum(n, 1), np.nan) for n, total in counts_and_sums]


# ---- the charts ------------------------------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def reward_curves(metrics: Sequence[Row], evaluations: Sequence[Row], best: int | None, size: tuple[int, int]) -> str:
    """Training reward with its spread; held-out reward of the tuned and the base model, with the interval between them.

    The error bars span `base + interval`: where they clear the base line, the difference is not chance.
    """
    figure, axes = canvas(*size, right=76)  # for the names at the ends of the lines
    x, mean, std = binned(column(metrics, "update"), column(metrics, "reward"), column(metrics, "reward_std"))
    when, tuned, base = (column(evaluations, key) for key in ("update", "reward", "base_reward"))
    if not np.isfinite([*mean, *tuned]).any():
        return ""
    axes.fill_between(x, mean - std, mean + std, color=TRAINING, alpha=0.13, linewidth=0)
    line(axes, x, mean, TRAINING, width=1.2)
    line(axes, when, base, MUTED, dashes=(4, 3))
    low, high = (base + bound for bound in bounds(evaluations))
    axes.vlines(when, low, high, color=EVALUATED, linewidth=5, alpha=0.22)
    line(axes, when, tuned, EVALUATED, width=2.2, marker="o")
    if best is not None:
        axes.plot(when[when == best], tuned[when == best], "o", color=EVALUATED, markersize=11, fillstyle="none")
    end_labels(axes, [("training", mean, TRAINING), ("tuned", tuned, EVALUATED), ("base", base, MUTED)])
    label = f"Reward by update. Training {ends(mean)}; evaluation: tuned {ends(tuned)}, base {ends(base)}."
    return svg(figure, f"reward-{size[0]}", label)


@matplotlib.rc_context(STYLE)
def difference_curve(evaluations: Sequence[Row]) -> str:
    """Draw the paired difference between tuned and base model on held-out prompts, with its 95 % interval."""
    figure, axes = canvas(height=280)
    when, difference = column(evaluations, "update"), column(evaluations, "difference")
    if not np.isfinite(difference).any():
        return ""
    low, high = bounds(evaluations)
    axes.axhline(0, color=MUTED, linewidth=1, dashes=(4, 3))
    axes.fill_between(when, low, high, color=EVALUATED, alpha=0.12, linewidth=0)
    axes.vlines(when, low, high, color=EVALUATED, linewidth=5, alpha=0.22)
    line(axes, when, difference, EVALUATED, width=2.2, marker="o")
    return svg(figure, "difference", f"Difference between tuned and base model by update: {ends(difference)}.")


@matplotlib.rc_context(STYLE)
def component_curve(metrics: Sequence[Row], evaluations: Sequence[Row], name: str, watched: bool) -> str:
    """One component of the reward, in training and on held-out prompts; or one that is watched, on held-out prompts."""
    figure, axes = canvas(height=180)
    kind, colour, marker = ("watched", WATCHED, "s") if watched else ("rewards", EVALUATED, "o")
    x, mean, std = binned(column(metrics, "update"), column(metrics, kind, name), column(metrics, "rewards_std", name))
    when, tuned, base = (column(evaluations, *keys) for keys in (("update",), (kind, name), (f"base_{kind}", name)))
    if not np.isfinite([*mean, *tuned]).any():
        return ""
    axes.fill_between(x, mean - std, mean + std, color=TRAINING, alpha=0.13, linewidth=0)
    line(axes, x, mean, TRAINING, width=1.2)
    line(axes, when, base, MUTED, dashes=(4, 3))
    line(axes, when, tuned, colour, width=2.0, marker=marker)
    low, high = axes.get_ylim()
    middle = (low + high) / 2
    if high - low < 0.1 * abs(middle):  # a flat curve should look flat
        axes.set_ylim(0.95 * middle, 1.05 * middle)
    label = f"{name}: evaluation, tuned {ends(tuned)}, base {ends(base)}; training {ends(mean)}."
    return svg(figure, f"component-{kind}-{name}", label)


@matplotlib.rc_context(STYLE)
def prompt_changes(changes: Sequence[float], size: tuple[int, int]) -> str:
    """Draw the change of every held-out prompt, sorted: how many fell, and how far, beside how many rose."""
    values = np.sort(np.array([change for change in changes if math.isfinite(change)]))
    if not len(values):
        return ""
    figure, axes = canvas(*size)
    edges = np.arange(len(values) + 1) + 0.5
    axes.stairs(np.maximum(values, 0), edges, fill=True, color=EVALUATED, alpha=0.85)
    axes.stairs(np.minimum(values, 0), edges, fill=True, color=FALL, alpha=0.85)
    axes.axhline(0, color=MUTED, linewidth=1)
    axes.set_xlabel("prompts, sorted", loc="right")
    text = f"Change of reward for each of {len(values)} prompts: from {values[0]:+.2g} to {values[-1]:+.2g}."
    return svg(figure, f"prompts-{size[0]}", f"{text} {int((values < 0).sum())} fell.")


@matplotlib.rc_context(STYLE)
def metric_curve(metrics: Sequence[Row], key: str) -> str:
    """Draw one metric of training by update, from zero where it is never negative.

    Where a point is the mean of several updates, a band goes from the lowest to the highest of them.
    """
    values = column(metrics, key)
    (x, y), (low, high) = binned(column(metrics, "update"), values), extremes(values)
    if not np.nan_to_num(values).any():  # nothing, or zero throughout: the page says so in words
        return ""
    figure, axes = canvas(height=180)
    if bin_size(len(values)) > 1:
        axes.fill_between(x, low, high, color=INK, alpha=0.25, linewidth=0.5)
    line(axes, x, y, INK, width=1.4)
    largest = np.nanmax(high)
    if np.nanmin(low) >= 0:
        axes.set_ylim(0, 1.08 * largest)
    return svg(figure, f"metric-{key}", f"{key} by update: {ends(y)}, largest {largest:.3g}.")


@matplotlib.rc_context(STYLE)
def gradient_by_step(metrics: Sequence[Row]) -> str:
    """The gradient norm of each update at the index k of the step it trained; the bar is the median of that k."""
    steps = sorted((name for name in names(metrics, "grad_norm_by_step") if name.isdecimal()), key=int)
    points = [(int(step), column(metrics, "grad_norm_by_step", step)) for step in steps]
    points = [(step, norms[norms > 0]) for step, norms in points if (norms > 0).any()]
    if not points:
        return ""
    figure, axes = canvas(height=180)
    for step, norms in points:
        spread = norms[:: -(-len(norms) // 40)]  # a thinned cloud is still the cloud
        axes.plot(np.full(len(spread), step), spread, "o", color=INK, markersize=3.5, alpha=0.3, markeredgewidth=0)
    medians = [float(np.median(norms)) for _, norms in points]
    axes.plot([step for step, _ in points], medians, "_", color=FALL, markersize=14, markeredgewidth=2.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("trained step k", loc="right")
    label = ", ".join(f"k = {step}: {median:.2g}" for (step, _), median in zip(points, medians, strict=True))
    return svg(figure, "gradient-by-step", f"Median gradient norm by trained step. {label}.")


@matplotlib.rc_context(STYLE)
def timing_bars(metrics: Sequence[Row], phases: Mapping[str, Values]) -> str:
    """Seconds of every update, stacked by phase in the order and the colours of the table beside it."""
    x, *seconds = binned(column(metrics, "update"), *(np.nan_to_num(values) for values in phases.values()))
    if not any(row.any() for row in seconds):
        return ""
    figure, axes = canvas()
    gap = float(x[-1] - x[-2]) if len(x) > 1 else 1.0
    edges, below = np.append(x, x[-1] + gap) - gap / 2, np.zeros(len(x))
    for i, row in enumerate(seconds):
        axes.stairs(below + row, edges, baseline=below, fill=True, color=PHASES[i % len(PHASES)])
        below = below + row
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g} s"))
    return svg(figure, "timings", f"Seconds an update by phase; {below.mean():.3g} s on average.")


# ---- what they share -------------------------------------------------------------------------------------------------


def canvas(width: int = 380, height: int = 220, right: int = 16) -> tuple[Figure, Axes]:
    """Draw one empty pair of axes; at 72 dots an inch a unit of the SVG is a point, so sizes read like CSS pixels.

    Its margins are fixed, since matplotlib draws a chart a second time to find out how wide its labels are.
    """
    left, top, bottom = 54, 8, 40
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    inner = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    axes = figure.add_axes(inner)
    axes.margins(x=0.03)
    axes.xaxis.set_major_locator(MaxNLocator(6 if width < 600 else 10, integer=True, steps=NICE))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=NICE))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}".replace("-", "\N{MINUS SIGN}")))
    axes.set_xlabel("update", loc="right")
    return figure, axes


def line(axes: Axes, x: Values, y: Values, colour: str, width: float = 1.4, marker: str = "", **style: Any) -> None:
    """A line through the finite points; one point alone is a marker, as a line through it would be invisible."""
    there = np.isfinite(y)
    if there.sum() == 1:
        marker = marker or "o"
    axes.plot(x[there], y[there], color=colour, linewidth=width, marker=marker, markersize=5, **style)


def end_labels(axes: Axes, series: Sequence[tuple[str, Values, str]]) -> None:
    """Name each line at its right end instead of in a legend; labels that would touch are moved apart."""
    low, high = axes.get_ylim()
    ends_of = sorted((y[np.isfinite(y)][-1], text, colour) for text, y, colour in series if np.isfinite(y).any())
    floor = -math.inf
    for y, text, colour in ends_of:
        floor = max(y, floor)
        axes.annotate(text, (1.01, floor), xycoords=("axes fraction", "data"), va="center", color=colour, weight="bold")
        floor += 0.085 * (high - low)


def ends(y: Values) -> str:
    """`0.51 to 0.74`, the first and the last finite value, for the spoken label of a chart."""
    finite = y[np.isfinite(y)]
    return f"{finite[0]:.3g} to {finite[-1]:.3g}" if len(finite) else "not measured"


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an SVG element that inherits colours and font; `name` keeps its ids apart from other charts'."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r".*?<svg[^>]*?viewBox=\"([^\"]*)\"[^>]*>", "", buffer.getvalue(), count=1, flags=re.S)
    unwanted = r"<metadata>.*?</metadata>", r"<style.*?</style>", r"(?<=<g) id=\"[^\"]*\"", r"font-family:[^;\"]*;?"
    text = re.sub("|".join(unwanted), "", text, flags=re.S)
    text = re.sub(r"\s*\n\s*", " ", text).replace("xlink:href", "href")
    text = re.sub("#[0-9a-f]{6}", lambda match: CSS.get(match[0], match[0]), text)
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    return f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}">{text.strip()}'
