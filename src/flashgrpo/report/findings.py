"""What the page says in words and figures."""

import math
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

from flashgrpo import formats
from flashgrpo.formats import DASH, MINUS, Numbers, called, not_held_out, number
from flashgrpo.report.record import Row, Run, Values, bounds, column, names, samples_of

RECENT = 10  # updates that tell how a run goes now
__all__ = ["DASH", "MINUS", "Numbers"]

SURE = "95\N{NO-BREAK SPACE}% interval"


def decimals(evaluation: Row | None) -> int:
    """Return the decimals of an evaluation's numbers."""
    row = evaluation or {}
    (low,), (high,) = bounds([row])
    return formats.decimals(row.get("difference"), [low, high], row.get("reward"))


class Result(NamedTuple):
    """`Held-out reward rose by 0.18 [0.15, 0.21]`, what that rests on, and which evaluation it is from."""

    headline: str
    basis: str
    choice: str


def result(shown: Row, evaluations: Sequence[Row], form: Numbers) -> Result:
    (low,), (high,) = bounds([shown])
    change, samples = number(shown.get("difference")), samples_of(shown)
    what = f"{called(shown)} reward"
    if math.isnan(low) or math.isnan(high):
        headline = f"{what.capitalize()} changed by {form.signed(change)}, with no interval to judge it by"
    elif low > 0:
        headline = f"{what.capitalize()} rose by {form.plain(change)} {form.interval(low, high)}"
    elif high < 0:
        headline = f"{what.capitalize()} fell by {form.plain(-change)} {form.interval(-high, -low)}"
    else:
        headline = f"No clear change of {what}: {form.signed(change)} {form.interval(low, high)} includes zero"
    counts = f"{len(samples)} paired samples, {len(by_prompt(samples))} prompts" if samples else ""
    basis = ", ".join(filter(None, ("" if math.isnan(low) else SURE, counts, not_held_out(shown))))
    return Result(headline, basis, choice(shown, evaluations, form))


def choice(shown: Row, evaluations: Sequence[Row], form: Numbers) -> str:
    """Say which evaluation the result is from. The best of several is selected by the reward it reports, so say so."""
    last, tuned = evaluations[-1], [row for row in evaluations if row["update"] > 0]
    when = f"Measured after update {shown['update']}"
    if len(tuned) == 1:
        return f"{when}, the only evaluation of the tuned model so far."
    if "selected_from" in shown:
        selection = next((row for row in tuned if row["update"] == shown["update"]), {})
        return (
            f"{when}, the best of {len(tuned)} evaluations, on other noise than selected it; the evaluation that "
            f"it was selected on says {form.showing(selection.get('difference')).signed(selection.get('difference'))}."
        )
    if shown.get("best") is not True:
        beaten = any(row.get("best") is True for row in evaluations)
        return f"{when}, the last of {len(tuned)} evaluations" + ("; none of them beat the base." if beaten else ".")
    if shown is last:
        return f"{when}, the last of {len(tuned)} evaluations and the best; selected by this number, which flatters it."
    (low,), (high,) = bounds([last])
    return (
        f"{when}, the best of {len(tuned)} evaluations and selected by this number, which flatters it; the last, after "
        f"update {last['update']}, stands at {form.signed(last.get('difference'))} {form.interval(low, high)}."
    )


def tiles(run: Run, shown: Row | None, form: Numbers) -> list[tuple[str, str, str]]:
    """Return the key figures: label, figure, remark."""
    figures = []
    if shown:
        (low,), (high,) = bounds([shown])
        rewards = f"{form.plain(shown.get('base_reward'))} → {form.plain(shown.get('reward'))}"
        figures.append((f"{called(shown).capitalize()} reward", rewards, f"base → tuned, update {shown['update']}"))
        between = f"{SURE} {form.plain(low)} to {form.plain(high)}" if low <= high else "no interval"
        figures.append(("Difference", form.signed(shown.get("difference")), between))
        moved = 100 * number(shown.get("average_moved"))
        if moved < 99.5:
            figures.append(
                ("Averaged weights", f"{moved:.0f} %", "of what was evaluated is trained, the rest the base")
            )
        watched = [component for component in components(shown) if component["watched"]]
        if watched:
            worst = min(watched, key=lambda part: math.inf if math.isnan(part["change"]) else part["change"])
            own = form.showing(worst["change"])
            remark = f"{worst['name']}, {own.plain(worst['base'])} → {own.plain(worst['tuned'])}"
            figures.append(("Watched only", own.signed(worst["change"]), remark))
    if run.metrics:
        samples, seconds = (column(run.metrics, *keys) for keys in (("samples",), ("seconds", "total")))
        seconds = seconds[seconds > 0]
        count = int(samples[samples > 0].sum())
        scored = f"{count:,} samples generated and scored" if count else ""
        figures.append(("Updates", f"{run.metrics[-1]['update']:,}", scored))
        if len(seconds):
            figures.append(("Time", duration(seconds.sum()), f"{seconds.mean():.3g} s an update"))
            if left := updates_left(run):
                pace = f"if it goes on: {left:,} updates, each as long as the last {len(seconds[-RECENT:])}"
                figures.append(("Left", duration(left * float(seconds[-RECENT:].mean())), pace))
    rate, highest = (column(run.metrics, key) for key in ("samples_per_second", "peak_gib"))
    if np.isfinite(rate[-RECENT:]).any():
        memory = f"memory {np.nanmax(highest):.3g} GiB at the highest" if np.isfinite(highest).any() else ""
        figures.append(("Samples a second", f"{mean(rate[-RECENT:]):.3g}", memory))
    return figures


def updates_left(run: Run) -> int:
    """Return how many updates of the recipe have not been done; 0 where that cannot be read."""
    found = re.search(r"(?m)^updates: (\d{1,7})$", run.config)
    return max(0, int(found[1]) - run.metrics[-1]["update"]) if found and run.metrics else 0


def warnings(run: Run) -> list[str]:
    """Say in plain words what is wrong with the newest updates; of all updates the sections tell."""
    recent, said = run.metrics[-RECENT:], []
    count = "the last update" if len(recent) == 1 else f"the last {len(recent)} updates"
    if skipped := int(np.nansum(column(recent, "skipped_steps"))):
        said.append(f"In {count} {skipped} optimizer step(s) were skipped, since their gradient was not finite.")
    if dropped := int(np.nansum(column(recent, "dropped_groups"))):
        said.append(f"In {count} {dropped} prompt group(s) were dropped, since a reward of theirs was not finite.")
    spread = column(recent, "reward_std")
    if len(recent) == RECENT and not np.nansum(np.abs(spread)) and np.isfinite(spread).any():
        said.append(f"In {count} all samples had the same reward, which teaches nothing.")
    return said


def date(started: object) -> str:
    """2026-07-31T03:41:22+00:00 -> 31 July 2026, 03:41 UTC; whatever is no date stays as it is."""
    try:
        moment = datetime.fromisoformat(str(started).replace("Z", "+00:00"))
    except ValueError:
        return str(started or "")
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".strip()


def duration(seconds: float) -> str:
    """72 -> 1 min 12 s, the two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def by_prompt(samples: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a row for each prompt, means over its samples, the largest fall first; `most` is what moved furthest."""
    groups: dict[str, list[Row]] = {}
    for sample in samples:
        groups.setdefault(str(sample.get("prompt", "")), []).append(sample)
    rows = [{"prompt": prompt, **change_of(group)} for prompt, group in groups.items()]
    return sorted(rows, key=lambda row: math.inf if math.isnan(row["change"]) else row["change"])


def change_of(samples: Sequence[Row]) -> dict[str, Any]:
    base, tuned = mean(column(samples, "base_reward")), mean(column(samples, "reward"))
    moved = {}
    for name in names(samples, "rewards"):
        before, after = pair(samples, "rewards", name)
        moved[name] = mean(after - before)
    finite = [(name, change) for name, change in moved.items() if math.isfinite(change)]
    most = max(finite, key=lambda item: abs(item[1]), default=None)
    return {"base": base, "tuned": tuned, "change": tuned - base, "most": most}


def mean(values: Values) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def pair(rows: Sequence[Row], kind: str, name: str) -> tuple[Values, Values]:
    """Return a component's values under the base and under the tuned model; `kind` is `rewards` or `watched`."""
    return column(rows, f"base_{kind}", name), column(rows, kind, name)


def components(row: Row | None) -> list[dict[str, Any]]:
    """Return every component of one evaluation, or of one of its samples, and after them what is only watched."""
    parts = []
    for kind in ("rewards", "watched"):
        for name in names([row or {}], kind):
            (base,), (tuned,) = pair([row or {}], kind, name)
            parts.append(
                {"name": name, "watched": kind == "watched", "base": base, "tuned": tuned, "change": tuned - base}
            )
    return parts


class Correlations(NamedTuple):
    """Rank correlations of all rewards with each other; `table[i]` is (name, watched, one value for each name)."""

    names: list[str]
    table: list[tuple[str, bool, list[float]]]


def correlations(shown: Row | None, of_changes: bool) -> Correlations | None:
    """Spearman's rank correlation between all components, trained and watched, over the samples of an evaluation.

    Args:
        of_changes: of the changes from the base model's sample to the tuned model's, rather than of the tuned samples.

    Returns:
        None where there are fewer than two components or three samples; nan for one that never changes.
    """
    samples = samples_of(shown)
    series = [
        (name, kind, pair(samples, kind, name)) for kind in ("rewards", "watched") for name in names(samples, kind)
    ]
    if len(series) < 2 or len(samples) < 3:
        return None
    ranks = np.array([rankdata(after - before if of_changes else after) for _, _, (before, after) in series])
    ranks = ranks - ranks.mean(axis=1, keepdims=True)
    size = np.sqrt((ranks**2).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = (ranks @ ranks.T) / np.outer(size, size)
    rows = [(name, kind == "watched", row) for (name, kind, _), row in zip(series, matrix.tolist(), strict=True)]
    return Correlations([name for name, _, _ in series], rows)


def phases(metrics: Sequence[Row]) -> dict[str, Values]:
    """Return seconds by phase, a value an update; `other` is what the phases leave of the total."""
    seconds = {name: column(metrics, "seconds", name) for name in names(metrics, "seconds") if name != "total"}
    known = sum(map(np.nan_to_num, seconds.values()), np.zeros(len(metrics)))
    rest = np.maximum(column(metrics, "seconds", "total") - known, 0)
    return {**seconds, "other": rest} if np.nansum(rest) > 0.01 * known.sum() else seconds
