"""comparison.json: what the runs of a comparison say, whole and summed up."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flashgrpo.compare import statistics
from flashgrpo.compare.folder import ComparisonFolder
from flashgrpo.compare.record import ENDED, read_run
from flashgrpo.jsontext import finite
from flashgrpo.report.record import Row, Values
from flashgrpo.scoring.intervals import mean_interval

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the first algorithm's gain: the levels where none are given
AXES = ("compute", "seconds")
VERSIONS = ("flashgrpo", "torch", "diffusers", "transformers", "peft", "numpy", "python", "platform", "device")


def collect(folder: ComparisonFolder, levels: Sequence[float] = ()) -> dict[str, Any]:
    """Read every run of the folder's plan, as far as it has come.

    Args:
        levels: held-out rewards whose compute is looked for; shares of the first algorithm's final gain by default.

    Raises:
        UserError: the folder has no plan.
    """
    plan = folder.plan()
    runs = [read_run(files, plan["algorithms"][files.algorithm]) for files in folder.runs(plan)]
    runs.sort(key=lambda run: [*plan["algorithms"]].index(run["algorithm"]))
    by_name = {name: [run for run in runs if run["algorithm"] == name] for name in plan["algorithms"]}
    ended = {name: [run for run in its if run["status"] in ENDED] for name, its in by_name.items()}
    first = next(iter(plan["algorithms"]))
    environments = [run.pop("environment") for run in runs]
    chosen = list(levels) or _default_levels(ended[first])
    seconds = _common_seconds(ended)
    summary = [
        {
            "algorithm": name,
            "seeds": len(its),
            "ended": len(ended[name]),
            "failed": sum(run["status"] == "failed" for run in its),
            "collapsed": sum(run["collapse"] is not None for run in its),
            "final": _score(ended[name], _final),
            "best": _score(ended[name], _best),
            "over_first": None if name == first else _paired(ended[name], ended[first]),
            "at_equal_seconds": _at(ended[name], seconds),
            "levels": _levels(ended[name], chosen),
            "curves": {axis: _band(ended[name], axis) for axis in AXES},
            **_training(its),
        }
        for name, its in by_name.items()
    ]
    return finite(
        {
            **plan,
            "versions": {key: env[key] for env in environments for key in VERSIONS if key in env},
            "base_reward": next((run["points"][0]["reward"] for run in runs if run["points"]), None),
            "trained_on": max(run["trained_on"] for run in runs),
            "levels": chosen,
            "equal_seconds": seconds,
            "summary": summary,
            "runs": runs,
        }
    )


# ---- over the runs of an algorithm -----------------------------------------------------------------------------------


def _final(run: Row) -> Row:
    return run["points"][-1]


def _best(run: Row) -> Row:
    """Return the best update on noise that selected nothing, where it was confirmed."""
    return run["confirmed"] or max(run["points"], key=lambda point: point["reward"])


def _score(runs: Sequence[Row], choose: Any) -> dict[str, Any] | None:
    """Average the held-out reward at one evaluation of each run, and its difference to the base with its interval."""
    if not runs:
        return None
    points = [choose(run) for run in runs]
    return {
        "reward": float(np.mean([point["reward"] for point in points])),
        "difference": float(np.mean([point["difference"] for point in points])),
        "interval": mean_interval(_complete([point["prompts"] for point in points])),
        "watched": _means([point["watched"] for point in points]),
        "base_watched": _means([point["base_watched"] for point in points]),
    }


def _complete(prompts: Sequence[Sequence[float | None]]) -> Values:
    """Return a row for each run, without the prompts that a run has left out; nothing of runs on other prompts."""
    if len({len(row) for row in prompts}) > 1:
        return np.zeros((len(prompts), 0))
    table = np.array(prompts, dtype=np.float64)
    return table[:, np.isfinite(table).all(axis=0)]


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _paired(runs: Sequence[Row], first: Sequence[Row]) -> dict[str, Any] | None:
    """Measure how far the final held-out reward lies above the first algorithm's, paired by seed and prompt."""
    others = {run["seed"]: run for run in first}
    pairs = [(run, others[run["seed"]]) for run in runs if run["seed"] in others]
    if not pairs:
        return None
    ends = _complete([_final(run)["prompts"] for pair in pairs for run in pair])
    rows = ends[::2] - ends[1::2]
    if not rows.size:
        return None
    return {
        "difference": float(np.mean(rows)),
        "interval": mean_interval(rows),
        "seeds": [run["seed"] for run, _ in pairs],
    }


def _default_levels(first: Sequence[Row]) -> list[float]:
    """Take quarters of the first algorithm's final gain, up to all of it; none where it gained nothing."""
    score = _score(first, _final)
    if score is None or score["difference"] <= 0:
        return []
    base = score["reward"] - score["difference"]
    return [round(base + share * score["difference"], 6) for share in SHARES]


def _levels(runs: Sequence[Row], levels: Sequence[float]) -> list[dict[str, float | None]]:
    """Return compute and seconds at which the mean over the seeds first reaches each level."""
    reached = []
    for level in levels:
        row: dict[str, float | None] = {"level": level}
        for axis in AXES:
            x, rewards = statistics.curve(runs, axis)
            row[axis] = statistics.first_reached(x, rewards.mean(axis=0), level - 1e-6) if runs else None
        reached.append(row)
    return reached


def _band(runs: Sequence[Row], axis: str) -> dict[str, list[float]]:
    """Return the held-out reward as it went: the mean over the seeds, and the lowest and the highest of them."""
    x, rewards = statistics.curve(runs, axis)
    parts = {"mean": rewards.mean(axis=0), "low": rewards.min(axis=0), "high": rewards.max(axis=0)} if runs else {}
    return {"x": x.tolist() if runs else [], **{name: values.tolist() for name, values in parts.items()}}


def _common_seconds(ended: Mapping[str, Sequence[Row]]) -> float | None:
    """Return the training time that all algorithms have come to, of those with runs that ended."""
    ends = [float(statistics.curve(runs, "seconds")[0][-1]) for runs in ended.values() if runs]
    return min(ends) if ends else None


def _at(runs: Sequence[Row], seconds: float | None) -> float | None:
    """Return the mean difference to the base model after a number of seconds of training."""
    if seconds is None or not runs:
        return None
    x, rewards = statistics.curve(runs, "seconds")
    return float(np.interp(seconds, x, rewards.mean(axis=0))) - float(runs[0]["points"][0]["reward"])


def _training(runs: Sequence[Row]) -> dict[str, Any]:
    """Say where compute and seconds went, and how even the gradients were: means over all runs, failed ones too."""
    updates = [update for run in runs for update in run["updates"]]
    rollout, update = (sum(line[f"{part}_compute"] for line in updates) for part in ("rollout", "update"))
    samples = sum(line["samples"] for line in updates)
    timed = [line["update_seconds"] for line in updates if line["update_seconds"] is not None]
    spread: dict[str, Any] = {}
    for key in ("over_updates", "over_steps"):
        values = [run["gradients"][key] for run in runs if run["gradients"][key] is not None]
        spread[key] = float(np.mean(values)) if values else None
    steps: dict[str, list[float]] = {step: [] for run in runs for step in run["gradients"]["by_step"]}
    for run in runs:
        for step, norm in run["gradients"]["by_step"].items():
            steps[step].append(norm)
    spread["by_step"] = {step: float(np.mean(steps[step])) for step in sorted(steps, key=int)}
    return {
        "compute": {"rollout": rollout, "update": update},
        "per_sample": {
            "rollout": rollout / samples if samples else None,
            "update": update / samples if samples else None,
            "update_seconds": sum(timed) / samples if timed else None,
        },
        "training_share": update / (rollout + update) if updates else None,
        "seconds_per_update": sum(run["updates"][-1]["seconds"] for run in runs if run["updates"]) / len(updates)
        if updates
        else None,
        "gradient_spread": spread,
    }
