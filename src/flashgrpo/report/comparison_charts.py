"""The charts of a comparison, drawn on given axes in given colours: for its page, and as figures for a paper."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FuncFormatter, MaxNLocator

from flashgrpo.files import write_aside
from flashgrpo.report.charts import GRID, INK, MUTED, NICE, PHASES
from flashgrpo.report.record import Row

MARKERS = "os^Dvp*X"
DASHES: Sequence[Any] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)))
ORDER = (0, 5, 3, 4, 2, 1, 7, 6)  # Okabe and Ito's colours, those that differ most first


@dataclass(frozen=True)
class Palette:
    """Colours by role; `series` has one for each algorithm in its order, and begins again after the eighth."""

    ink: str
    muted: str
    grid: str
    series: Sequence[str]

    def style(self, number: int) -> dict[str, Any]:
        """Of the lines of an algorithm: colour, marker and dashes all tell it from its neighbours."""
        colour = self.series[number % len(self.series)]
        return {"color": colour, "marker": MARKERS[number % 8], "linestyle": DASHES[number % 4]}


PAGE = Palette(INK, MUTED, GRID, [PHASES[i] for i in ORDER])
OKABE_ITO = ("#0072b2", "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#f0e442", "#7f7f7f")
PAPER = Palette("#1a1d21", "#5f6770", "#e3e5e8", [OKABE_ITO[i] for i in ORDER])


def reward_by(axis: str) -> Callable[[Axes, Row, Palette], bool]:
    """Held-out reward against `compute` or `seconds`: the mean over the seeds, a band from the lowest to the highest.

    A run that failed or is unfinished is a thin line that ends in a cross where its last evaluation lies.
    """

    def draw(axes: Axes, comparison: Row, palette: Palette) -> bool:
        drawn = False
        for number, row in enumerate(comparison["summary"]):
            style, curve = palette.style(number), row["curves"][axis]
            if curve["x"]:
                x, mean, low, high = (np.array(curve[name], float) for name in ("x", "mean", "low", "high"))
                axes.fill_between(x, low, high, color=style["color"], alpha=0.14, linewidth=0)
                axes.plot(x, mean, label=row["algorithm"], linewidth=1.8, markersize=5, **style)
                drawn = True
            for run in comparison["runs"]:
                if run["algorithm"] == row["algorithm"] and run["status"] in ("failed", "unfinished") and run["points"]:
                    x, y = (np.array([point[key] for point in run["points"]], float) for key in (axis, "reward"))
                    axes.plot(x, y, color=style["color"], linewidth=0.9, alpha=0.8)
                    axes.plot(x[-1:], y[-1:], "x", color=style["color"], markersize=7, markeredgewidth=1.6)
                    drawn = True
        if comparison["base_reward"] is not None:
            base = float(comparison["base_reward"])
            axes.axhline(base, color=palette.muted, linewidth=1, dashes=(4, 3), label="base model")
        axes.set_xlabel("network forwards" if axis == "compute" else "seconds of training", loc="right")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(AutoLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        return drawn

    return draw


def cost_bars(axes: Axes, comparison: Row, palette: Palette) -> bool:
    """Network forwards of one update: the rollout's part pale, the training's in the algorithm's colour."""
    names = list(comparison["algorithms"])
    costs = [comparison["algorithms"][name]["compute_per_update"] for name in names]
    widest = max(cost["rollout"] + cost["update"] for cost in costs)
    for number, cost in enumerate(costs):
        colour = palette.style(number)["color"]
        axes.barh(number, cost["rollout"], 0.62, color=colour, alpha=0.3)
        axes.barh(number, cost["update"], 0.62, left=cost["rollout"], color=colour)
        end = cost["rollout"] + cost["update"]
        share = f"{100 * cost['update'] / end:.0f} % trains"
        axes.text(end + 0.015 * widest, number, share, va="center", color=palette.ink)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=palette.ink)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1.3 * widest)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=NICE))
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.set_xlabel("network forwards of an update", loc="right")
    return True


def gradient_by_step(axes: Axes, comparison: Row, palette: Palette) -> bool:
    """Draw the mean gradient norm of each denoising step, relative to the mean over the steps of its algorithm.

    An algorithm whose steps weigh alike is a level line at 1, whatever the size of its gradients.
    """
    drawn = False
    for number, row in enumerate(comparison["summary"]):
        norms = row["gradient_spread"]["by_step"]
        values = np.array(list(norms.values()), float)
        if len(values) and values.mean() > 0:
            steps = [int(step) for step in norms]
            style = palette.style(number)
            axes.plot(steps, values / values.mean(), label=row["algorithm"], linewidth=1.6, markersize=5, **style)
            drawn = True
    axes.axhline(1, color=palette.muted, linewidth=1, dashes=(4, 3))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=NICE))
    axes.set_xlabel("denoising step k", loc="right")
    return drawn


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write `path` with the endings .svg and .png; equal figures give equal bytes."""
    files = [path.with_name(f"{path.name}.{ending}") for ending in ("svg", "png")]
    for file, metadata in zip(files, ({"Date": None}, None), strict=True):
        with write_aside(file) as aside:
            figure.savefig(aside, dpi=200, metadata=metadata)
    return files


def short(value: int | float, _: object = None) -> str:
    """1500 -> 1.5k; ticks and labels."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
