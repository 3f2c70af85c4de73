"""One self-contained HTML page from a run directory, or from the folder of a comparison.

    write_report(Path("runs/demo"))  ->  runs/demo/report.html

The page opens from disk without a network: videos and images are data URIs, charts inline SVG, style and script inline.
It is made from the files of the run alone, so it can be written while the run trains, after it was killed, or
elsewhere; whatever is missing is named on the page. The same files give the same page, byte for byte.

    record.py         reads the run directory
    samples.py        what it shows of samples
    findings.py       what the page says in words and figures
    charts.py         what it draws
    template.html.j2  how it looks; style.css, page.py: what all pages share
    live.py           serves it while the run trains (`flashgrpo watch`); runs.html.j2, waiting.html.j2
    comparison.py, comparison_charts.py, comparison.html.j2: the same for a comparison
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from flashgrpo.files import write_text
from flashgrpo.formats import Numbers, called
from flashgrpo.report import charts, comparison, findings
from flashgrpo.report.page import both_shapes, template
from flashgrpo.report.record import Row, Run, column, headline_evaluation, names, read_run, samples_of
from flashgrpo.report.samples import Media, filmstrips, shown_pairs

__all__ = ["write_report"]

EXTREMES = 5  # prompts shown at either end of the sorted table
HEALTH = {
    "grad_norm": ("Gradient norm", "by update"),
    "drift": ("Drift of the replay", "largest deviation of the ratio from 1 before the policy has moved"),
    "ratio_max_dev": ("Deviation of the ratio from 1", "over the whole update"),
    "clip_fraction": ("Clipped share", "of the samples of an update"),
    "approx_kl": ("Approximate KL", "from the policy of the rollout"),
    "kl": ("KL to the base", "the penalty's own estimate"),
}


def write_report(run: Path) -> Path:
    """Write `report.html` into the folder of a run, or of a comparison, and return its path.

    Raises:
        UserError: it is neither.
    """
    run = Path(run)
    page = comparison.render(run) if comparison.is_one(run) else render(read_run(run))
    target = run / "report.html"
    write_text(target, page)
    return target


def render(run: Run, live: bool = False) -> str:
    """Return the page of a run.

    Args:
        live: as `flashgrpo watch` serves it: media are links into the run directory, and the page follows the run.
    """
    shown = run.result
    form = Numbers(findings.decimals(shown))
    prompts = findings.by_prompt(samples_of(shown))
    media = Media(run.path, live)
    pairs = shown_pairs(run, headline_evaluation(run.evaluations), media)
    return template("template.html.j2").render(
        name=run.path.resolve().name,
        kind=called(shown or next(iter(run.evaluations), {})),
        date=findings.date(run.environment.get("started")),
        version=run.environment.get("flashgrpo", ""),
        live=live,
        notes=[*run.notes, *findings.warnings(run)],
        result=findings.result(shown, run.evaluations, form) if shown else None,
        tiles=findings.tiles(run, shown, form),
        form=form,
        two=Numbers(2),
        rewards=reward_charts(run, shown),
        watch=watch_note(run.evaluations),
        correlations=[
            (title, findings.correlations(shown, of_changes))
            for title, of_changes in (("Tuned samples", False), ("Changes, tuned − base", True))
            if findings.correlations(shown, of_changes)
        ],
        pairs=pairs,
        strips=filmstrips(run, media),
        videos=any(pair["kind"] == "video" for pair in (*pairs.plain, *pairs.extremes)),
        prompts=prompts,
        lowest=prompts[:EXTREMES],
        highest=prompts[: -EXTREMES - 1 : -1],
        prompt_chart=both_shapes(
            lambda size: charts.prompt_changes([row["change"] for row in prompts], size), (1080, 240)
        ),
        health=health_charts(run),
        timing=timing(run),
        config=run.config,
        environment={key: plain_text(value) for key, value in run.environment.items()},
    )


def plain_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---- sections of the page --------------------------------------------------------------------------------------------


def reward_charts(run: Run, shown: Row | None) -> dict[str, Any]:
    """Draw the large chart in two shapes, for wide and narrow screens; the difference; a panel for each component."""
    headline = headline_evaluation(run.evaluations)
    best = headline["update"] if headline and headline.get("best") is True else None
    panels = []
    watched = names(run.evaluations, "watched")
    rewards = [name for name in names([*run.metrics, *run.evaluations], "rewards") if name not in watched]
    at_end = {(part["watched"], part["name"]): part for part in findings.components(shown)}
    for is_watched, name in [*((False, name) for name in rewards), *((True, name) for name in watched)]:
        chart = charts.component_curve(run.metrics, run.evaluations, name, is_watched)
        part = at_end.get((is_watched, name))
        spread = column(run.metrics, "rewards_std", name)
        failures = column([*run.metrics, *run.evaluations], "reward_failures", name.split(".")[0])
        panels.append(
            {
                "name": name,
                "watched": is_watched,
                "chart": Markup(chart),
                "part": part,
                "spread": findings.mean(spread),
                "failures": int(np.nansum(failures)),
            }
        )
    curves = both_shapes(lambda size: charts.reward_curves(run.metrics, run.evaluations, best, size), (740, 300))
    difference = Markup(charts.difference_curve(run.evaluations))
    confirmed = shown is not None and "selected_from" in shown
    return {"curves": curves, "difference": difference, "panels": panels, "confirmed": confirmed}


def watch_note(evaluations: Sequence[Row]) -> str:
    """Say which watched reward has fallen too far at the last evaluation, and so ended the run."""
    why = evaluations[-1].get("watch") if evaluations else None
    return f"At the last evaluation, after update {evaluations[-1]['update']}, {why}." if isinstance(why, str) else ""


def health_charts(run: Run) -> dict[str, Any]:
    """Gradient norm over updates and by trained step, and the stability of the updates."""
    curves, size = [], charts.bin_size(len(run.metrics))
    of_bins = f"; means of {size} updates, with their lowest and highest" if size > 1 else ""
    for key, (title, remark) in HEALTH.items():
        values = column(run.metrics, key)
        values = values[np.isfinite(values)]
        if not len(values) or (key == "kl" and not values.any()):
            continue
        largest = f"{np.abs(values).max():.2g}"
        chart = charts.metric_curve(run.metrics, key)
        curves.append({"title": title, "remark": remark + of_bins, "largest": largest, "chart": Markup(chart)})
    without_spread = column(run.metrics, "zero_spread_groups")
    return {
        "by_step": Markup(charts.gradient_by_step(run.metrics)),
        "curves": curves,
        "dropped": int(np.nansum(column(run.metrics, "dropped_groups"))),
        "skipped": int(np.nansum(column(run.metrics, "skipped_steps"))),
        "without_spread": int(np.nansum(without_spread)) if np.isfinite(without_spread).any() else 0,
    }


def timing(run: Run) -> dict[str, Any]:
    phases = findings.phases(run.metrics)
    spent = {name: float(np.nansum(values)) for name, values in phases.items()}
    total = sum(spent.values()) or math.nan
    rows = [
        {
            "phase": name,
            "mean": f"{seconds / len(run.metrics):.2f} s",
            "sum": findings.duration(seconds),
            "share": f"{100 * seconds / total:.0f} %",
            "colour": i % len(charts.PHASES),
        }
        for i, (name, seconds) in enumerate(spent.items())
    ]
    return {"chart": Markup(charts.timing_bars(run.metrics, phases)), "rows": rows}
