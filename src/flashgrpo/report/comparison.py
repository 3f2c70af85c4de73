"""The page of a comparison, from its comparison.json alone."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib.axes import Axes

from flashgrpo.files import explain_damage, read_object
from flashgrpo.formats import Numbers, called, not_held_out
from flashgrpo.report import charts
from flashgrpo.report import comparison_charts as drawings
from flashgrpo.report.findings import decimals, duration
from flashgrpo.report.page import both_shapes, template
from flashgrpo.report.record import Row

Draw = Callable[[Axes, Row, drawings.Palette], bool]


def is_one(folder: Path) -> bool:
    """Return whether it is the folder of a comparison that has results."""
    return (folder / "comparison.json").is_file()


def render(folder: Path) -> str:
    """Render the page.

    Raises:
        UserError: comparison.json is not that of a comparison.
    """
    file = folder / "comparison.json"
    comparison = read_object(file)
    with explain_damage(file, "run `flashgrpo compare` again to write it anew"):
        return _rendered(folder, comparison)


def _rendered(folder: Path, comparison: Row) -> str:
    summary = comparison["summary"]
    form = Numbers(max([3, *(decimals(row["final"]) for row in summary if row["final"])]))  # effects are compared
    count = len(summary)
    return template("comparison.html.j2").render(
        name=folder.resolve().name,
        comparison=comparison,
        summary=summary,
        first=summary[0]["algorithm"],
        form=form,
        kind=called(comparison),
        headline=headline(summary, form),
        differences=[difference(row, summary[0]["algorithm"], form) for row in summary if row["over_first"]],
        notes=notes(comparison),
        lines=[f"var(--phase-{drawings.ORDER[i % 8]})" for i in range(count)],
        by_compute=chart(comparison, "compute", drawings.reward_by("compute"), (1080, 340)),
        by_seconds=chart(comparison, "seconds", drawings.reward_by("seconds"), (1080, 300)),
        costs=chart(comparison, "costs", drawings.cost_bars, (520, 70 + 40 * count)),
        gradients=chart(comparison, "gradients", drawings.gradient_by_step, (520, 260)),
        watched=sorted({name for row in summary if row["final"] for name in row["final"]["watched"]}),
        unlike=unlike(comparison["algorithms"]),
        settings={
            name: yaml.safe_dump(entry["settings"], sort_keys=False, allow_unicode=True)
            for name, entry in comparison["algorithms"].items()
        },
        duration=duration,
        short=drawings.short,
    )


def headline(summary: Sequence[Row], form: Numbers) -> str:
    """Say which algorithm ended highest, as far as the intervals tell."""
    scored = [row for row in summary if row["final"]]
    if not scored:
        return "No run has ended yet"
    best = max(scored, key=lambda row: row["final"]["difference"])
    name, gain, interval = best["algorithm"], best["final"]["difference"], best["final"]["interval"]
    if not interval:
        return f"{name} ended {form.signed(gain)} from the base model, with no interval to judge it by"
    between = f"{form.signed(gain)} {form.interval(*interval)}"
    if interval[1] < 0:
        return f"Every algorithm ended below the base model, {name} the least: {between}"
    if interval[0] <= 0:
        return f"No algorithm ended clearly above the base model; nearest to it is {name}: {between} includes zero"
    unclear = [row["algorithm"] for row in scored if row is not best and not _is_clear(best, row)]
    but = f", but not clearly above {' and '.join(unclear)}" if unclear else ""
    return f"{name} ended highest: {between} over the base model{but}"


def _is_clear(best: Row, other: Row) -> bool:
    """Whether the paired interval of two algorithms leaves out zero; only those with the first one are known."""
    intervals = [row["over_first"]["interval"] for row in (best, other) if row["over_first"]]
    return len(intervals) != 1 or not intervals[0] or intervals[0][0] > 0 or intervals[0][1] < 0


def difference(row: Row, first: str, form: Numbers) -> str:
    """Say how an algorithm ended: `flow-grpo ended 0.08 [0.03, 0.13] below flash-grpo, paired over 3 seeds.`"""
    change, interval, seeds = (row["over_first"][key] for key in ("difference", "interval", "seeds"))
    paired = f"paired over {len(seeds)} seed" + ("s" if len(seeds) > 1 else "")
    if not interval:
        return (
            f"{row['algorithm']} ended {form.signed(change)} from {first}, {paired}, with no interval to judge it by."
        )
    low, high = interval
    if low > 0:
        return f"{row['algorithm']} ended {form.plain(change)} {form.interval(low, high)} above {first}, {paired}."
    if high < 0:
        return f"{row['algorithm']} ended {form.plain(-change)} {form.interval(-high, -low)} below {first}, {paired}."
    between = f"{form.signed(change)} {form.interval(low, high)}"
    return f"No clear difference between {row['algorithm']} and {first}: {between}, {paired}."


def notes(comparison: Row) -> list[str]:
    """Say what a reader has to know before the figures."""
    found = []
    for run in comparison["runs"]:
        who = f"{run['algorithm']}, seed {run['seed']}"
        if run["status"] != "complete":
            found.append(f"{who}: {run['status']}" + (f" ({run['reason']})." if run["reason"] else "."))
        if run["collapse"] and run["collapse"] != run["reason"]:
            found.append(f"{who}: collapsed ({run['collapse']}).")
    if why := not_held_out(comparison):
        found.append(f"The evaluation is not held-out: {why}.")
    if len(comparison["seeds"]) == 1:
        found.append("One seed: intervals are over prompts alone and say nothing of how runs differ.")
    return found


def unlike(algorithms: Mapping[str, Row]) -> list[tuple[str, list[str]]]:
    """Return the settings in which the algorithms differ: key, and a value for each."""
    flat = [_flat(entry["settings"]) for entry in algorithms.values()]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [(key, [json.dumps(settings[key]) if key in settings else "" for settings in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and key != "evaluation.every"]


def _flat(tree: Row, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def chart(comparison: Row, name: str, draw: Draw, wide: tuple[int, int]) -> dict[str, Any] | None:
    """Draw a chart in both shapes, None where there is nothing to draw."""

    def drawn(size: tuple[int, int]) -> str:
        with matplotlib.rc_context(charts.STYLE):
            figure, axes = charts.canvas(size[0], wide[1] if name == "costs" else size[1])
            there = draw(axes, comparison, drawings.PAGE)
            return charts.svg(figure, f"comparison-{name}-{size[0]}", spoken(comparison, name)) if there else ""

    shapes = both_shapes(drawn, wide)
    return shapes if shapes["wide"] else None


def spoken(comparison: Row, name: str) -> str:
    """Say what a chart shows, for those who do not see it."""
    if name == "costs":
        costs = {name: entry["compute_per_update"] for name, entry in comparison["algorithms"].items()}
        parts = [f"{name}: rollout {cost['rollout']}, update {cost['update']}" for name, cost in costs.items()]
        return f"Network forwards of one update. {'; '.join(parts)}."
    if name == "gradients":
        parts = [
            f"{row['algorithm']}: standard deviation {row['gradient_spread']['over_steps']:.2f} of the mean"
            for row in comparison["summary"]
            if row["gradient_spread"]["over_steps"] is not None
        ]
        return f"Gradient norm by denoising step, relative to its mean. {'; '.join(parts)}."
    parts = [
        f"{row['algorithm']}: {row['curves'][name]['mean'][0]:.3g} to {row['curves'][name]['mean'][-1]:.3g}"
        for row in comparison["summary"]
        if row["curves"][name]["x"]
    ]
    return f"{called(comparison).capitalize()} reward by {name}. {'; '.join(parts)}."
