"""comparison.md: what a comparison found, in tables."""

from collections.abc import Sequence

from flashgrpo.formats import Numbers, called, not_held_out
from flashgrpo.report.findings import duration
from flashgrpo.report.record import Row


def as_markdown(comparison: Row) -> str:
    """Write the comparison as text that is read as it stands, and as Markdown."""
    summary, runs = comparison["summary"], comparison["runs"]
    first, base = summary[0]["algorithm"], comparison["base_reward"]
    what, form = f"{called(comparison)} reward", Numbers.alone(base)
    began = f"; the base model's {what} is {form.plain(base)}" if base is not None else ""
    parts = [
        f"# {', '.join(row['algorithm'] for row in summary)} on {comparison['recipe']}",
        f"Every run has {comparison['budget']:,} network forwards to spend (a backward counts two, recomputation one "
        f"more; evaluations are not counted). Base weights, prompts and evaluation noise are the same{began}; "
        f"seeds {', '.join(map(str, comparison['seeds']))}.",
        "## Result",
        grid(
            ["algorithm", "seeds", "updates", "final, 95 % interval", "best", f"above {first}"],
            [
                [
                    row["algorithm"],
                    f"{row['ended']} of {row['seeds']}",
                    f"{comparison['algorithms'][row['algorithm']]['updates']:,}",
                    score(row["final"]),
                    score(row["best"]),
                    change(row["over_first"]),
                ]
                for row in summary
            ],
        ),
        f"{what.capitalize()} and its difference to the base model; 95 % intervals by Student's t over seeds and "
        "prompts (crossed effects), of one seed over prompts alone. `best` is each run's best update, scored once more "
        "on noise that had no part in selecting it. "
        f"`above {first}` is paired, by seed and prompt. Runs that failed or are unfinished are not in these figures.",
    ]
    if why := not_held_out(comparison):
        parts.append(f"The evaluation is not held-out: {why}.")
    if comparison["levels"]:
        heads = [f"{level:.4g}" for level in comparison["levels"]]
        rows = [[row["algorithm"], *(cost(reached) for reached in row["levels"])] for row in summary]
        parts += [
            f"## Compute to reach {'a held-out' if called(comparison) == 'held-out' else 'an evaluation'} reward",
            grid(["algorithm", *heads], rows),
            "Forwards (and time of training) at which the mean over the seeds first gets there, between evaluations by "
            "interpolation; - where it never does.",
        ]
    parts += ["## Cost and stability", _stability(comparison)]
    if troubled := _troubled(runs):
        parts += ["## Runs to know of", troubled]
    return "\n\n".join(parts) + "\n"


def _stability(comparison: Row) -> str:
    seconds = comparison["equal_seconds"]
    rows = [
        [
            row["algorithm"],
            _per_sample(row["per_sample"]),
            percent(row["training_share"]),
            duration(row["seconds_per_update"]) if row["seconds_per_update"] else "-",
            "-" if row["at_equal_seconds"] is None else _gain(row["at_equal_seconds"]),
            percent(row["gradient_spread"]["over_updates"]),
            percent(row["gradient_spread"]["over_steps"]),
            f"{row['collapsed']} of {row['seeds']}",
        ]
        for row in comparison["summary"]
    ]
    after = f"gain after {duration(seconds)}" if seconds else "gain at equal seconds"
    heads = [
        "forwards a sample",
        "training's share",
        "an update",
        after,
        "gradient norm over updates",
        "over steps",
        "collapsed",
    ]
    return (
        grid(["algorithm", *heads], rows)
        + "\n\nForwards a sample are those of the rollout and those of training on it, with the seconds of the latter. "
        "Training's share is of the forwards; the time of an update is of rollout, decoding, rewards and update. The "
        "spread of the gradient norm is its standard deviation in per cent of its mean: over updates, and over the "
        "denoising steps, of the mean norm of each."
    )


def _gain(change: float) -> str:
    return Numbers.of({"difference": change}).signed(change)


def _per_sample(cost: Row) -> str:
    """Format a sample's forwards: `40 + 114 (0.12 s)`."""
    if cost["rollout"] is None:
        return "-"
    seconds = "" if cost["update_seconds"] is None else f" ({cost['update_seconds']:.3g} s)"
    return f"{cost['rollout']:.3g} + {cost['update']:.3g}{seconds}"


def _troubled(runs: Sequence[Row]) -> str:
    rows = [
        [run["algorithm"], str(run["seed"]), run["status"], "; ".join(filter(None, {run["reason"], run["collapse"]}))]
        for run in runs
        if run["status"] != "complete" or run["collapse"]
    ]
    return grid(["algorithm", "seed", "status", "why"], rows) if rows else ""


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table, padded so that it is one as plain text, too."""
    table = [[cell.replace("|", "\\|") for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def score(of: Row | None) -> str:
    """Format a reward with its change: `0.712, +0.140 (+0.101 to +0.180)`."""
    return "-" if of is None else f"{Numbers.of(of).plain(of['reward'])}, {change(of)}"


def change(of: Row | None) -> str:
    """Format a change with its interval: `+0.140 (+0.101 to +0.180)`."""
    if of is None:
        return "-"
    form = Numbers.of(of)
    between = "" if of["interval"] is None else f" ({form.between(of['interval'])})"
    return f"{form.signed(of['difference'])}{between}"


def cost(reached: Row) -> str:
    """Format what a level cost, `12,300 (41.0 s)`; three digits are all that an interpolation supports."""
    if reached["compute"] is None:
        return "-"
    seconds = "" if reached["seconds"] is None else f" ({duration(reached['seconds'])})"
    return f"{float(format(reached['compute'], '.3g')):,.0f}{seconds}"


def percent(share: float | None) -> str:
    """Format a share: `14 %`."""
    return "-" if share is None else f"{100 * share:.0f} %"
