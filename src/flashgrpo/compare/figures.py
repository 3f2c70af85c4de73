"""figures/*.svg and *.png: the charts of a comparison for a page of 6.5 inches, in the colours of Okabe and Ito."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from flashgrpo.files import write_aside
from flashgrpo.formats import called
from flashgrpo.report import comparison_charts as charts
from flashgrpo.report.charts import NICE

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.parse_math": False,  # names come from the user
    "svg.fonttype": "none",
    "svg.hashsalt": "comparison",
    "axes.edgecolor": charts.PAPER.muted,
    "axes.labelcolor": charts.PAPER.ink,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": charts.PAPER.grid,
    "grid.linewidth": 0.7,
    "xtick.color": charts.PAPER.muted,
    "ytick.color": charts.PAPER.muted,
    "xtick.labelcolor": charts.PAPER.ink,
    "ytick.labelcolor": charts.PAPER.ink,
    "text.color": charts.PAPER.ink,
}
FIGURES = {
    "reward-by-compute": (charts.reward_by("compute"), "reward", (6.5, 3.2)),
    "reward-by-seconds": (charts.reward_by("seconds"), "reward", (6.5, 3.2)),
    "cost-of-an-update": (charts.cost_bars, "", (6.5, 0.0)),
    "gradient-by-step": (charts.gradient_by_step, "gradient norm / its mean", (6.5, 2.8)),
}


@matplotlib.rc_context(STYLE)
def write_figures(comparison: charts.Row, folder: Path) -> None:
    """Write each figure that there is data for as SVG and as PNG; the folder is replaced."""
    count = len(comparison["algorithms"])
    with write_aside(folder) as aside:
        aside.mkdir()
        for name, (draw, label, (width, height)) in FIGURES.items():
            figure = Figure(figsize=(width, height or 0.9 + 0.4 * count), layout="constrained")
            axes = figure.subplots()
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=NICE))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            if not draw(axes, comparison, charts.PAPER):
                continue
            axes.set_ylabel(label and f"{called(comparison)} {label}")
            if axes.get_legend_handles_labels()[0]:
                figure.legend(loc="outside upper left", ncols=4, frameon=False, handlelength=3)
            charts.save_figure(figure, aside / name)
