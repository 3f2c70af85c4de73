"""comparison.json: what the run directories of a comparison say, whole and summed up."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flashgrpo.compare import statistics
from flashgrpo.compare.folder import ComparisonFolder, RunFiles
from flashgrpo.files import finite, read_text
from flashgrpo.report.record import Row
from flashgrpo.run import checkpoint
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.lines import read_lines
from flashgrpo.scoring.heldout import selected
from flashgrpo.scoring.intervals import mean_interval

NOT_TRAINING = ("evaluate", "checkpoint", "total")  # phases that a comparison by seconds leaves out
KEPT = (
    *("reward", "reward_std", "grad_norm", "drift", "ratio_mean", "ratio_max_dev", "clip_fraction", "approx_kl", "kl"),
    *("skipped_steps", "dropped_groups"),  # in lines of updates that had some
)
UPDATE_NEEDS = ("compute", "seconds", "samples", "grad_norm_by_step")
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the first algorithm's gain: the levels where none are given
AXES = ("compute", "seconds")
ENDED = ("complete", "ended early")
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


def read_run(files: RunFiles, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Read one run: how it ended, and every evaluation and update, by the compute and the seconds spent until then."""
    metrics, evaluations = (
        read_lines(files.path / "metrics.jsonl", UPDATE_NEEDS),
        read_lines(files.path / "evaluations.jsonl", ("watch",)),
    )
    settings = entry["settings"]
    compute, seconds, updates = [0], [0.0], []
    for line in metrics:
        compute.append(compute[-1] + sum(line["compute"].values()))
        spent = sum(time for phase, time in line["seconds"].items() if phase not in NOT_TRAINING)
        seconds.append(seconds[-1] + spent)
        updates.append(
            {
                "update": line["update"],
                "compute": compute[-1],
                "rollout_compute": line["compute"]["rollout"],
                "update_compute": line["compute"]["update"],
                "seconds": round(seconds[-1], 3),
                "samples": line["samples"],
                "update_seconds": line["seconds"].get("update"),
                **{key: line.get(key) for key in KEPT},
                "grad_norm_by_step": line["grad_norm_by_step"],
            }
        )
    each = settings["evaluation"]["samples_per_prompt"]
    points = [
        {
            **_point(line, each),
            "watch": line["watch"],
            "compute": compute[line["update"]],
            "seconds": round(seconds[line["update"]], 3),
        }
        for line in evaluations
        if line["update"] < len(compute)
    ]
    confirmed = RunDirectory(files.path).confirmation()
    status, reason = _status(files, points, entry)
    run: dict[str, Any] = {"algorithm": files.algorithm, "seed": files.seed, "status": status, "reason": reason}
    run["trained_on"] = max((line.get("trained_on", 0) for line in evaluations), default=0)
    run |= {"folder": f"{files.path.parent.name}/{files.path.name}", "points": points, "updates": updates}
    run |= {"selected": selected(evaluations), "confirmed": _point(confirmed, each) if confirmed else None}
    run = finite(run)
    environment = RunDirectory(files.path).environment()
    return {
        **run,
        "collapse": statistics.collapse(run),
        "gradients": statistics.gradient_spread(run["updates"]),
        "environment": environment,
    }


def _point(line: Row, each: int) -> dict[str, Any]:
    kept = ("update", "reward", "base_reward", "difference", "interval", "rewards")
    watched = ("watched", "base_watched", "watched_intervals")
    return {**{key: line[key] for key in (*kept, *watched)}, "prompts": _by_prompt(line["samples"], each)}


def _by_prompt(samples: Sequence[Row], each: int) -> list[float]:
    """Return the difference to the base model on every prompt, the mean over its samples."""
    differences = [sample["reward"] - sample["base_reward"] for sample in samples]
    return np.reshape(differences, (-1, each)).mean(axis=1).tolist()


def _status(files: RunFiles, points: Sequence[Row], entry: Mapping[str, Any]) -> tuple[str, str | None]:
    """`complete`, `ended early` by the recipe's own rules, `failed`, or `unfinished`; and why."""
    patience = entry["settings"]["evaluation"]["patience"]
    if points:
        rewards = [float("-inf") if point["watch"] else point["reward"] for point in points]
        stale = len(points) - 1 - rewards.index(max(rewards))
        if points[-1]["update"] >= entry["updates"]:
            return "complete", None
        if points[-1]["watch"]:
            return "ended early", points[-1]["watch"]
        if patience is not None and stale >= patience:
            return "ended early", f"no new best in {stale} evaluations"
    if files.failure.exists():
        return "failed", read_text(files.failure).strip()
    return "unfinished", None


def is_done(files: RunFiles, entry: Mapping[str, Any]) -> bool:
    """Return whether there is nothing left to do for a run, not even to save its last checkpoint or confirm its best.

    A full training, whose base model is gone when it ends, confirms nothing.
    """
    run = read_run(files, entry)
    saved = checkpoint.updates(files.path / "checkpoints")[-1:]
    if run["selected"] and not run["confirmed"] and entry["settings"]["model"]["train"]["kind"] == "lora":
        return False
    return run["status"] in ENDED and saved == [run["points"][-1]["update"]] and not files.busy


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
        "interval": mean_interval([point["prompts"] for point in points]),
        "watched": _means([point["watched"] for point in points]),
        "base_watched": _means([point["base_watched"] for point in points]),
    }


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _paired(runs: Sequence[Row], first: Sequence[Row]) -> dict[str, Any] | None:
    """Measure how far the final held-out reward lies above the first algorithm's, paired by seed and prompt."""
    others = {run["seed"]: run for run in first}
    pairs = [(run, others[run["seed"]]) for run in runs if run["seed"] in others]
    if not pairs:
        return None
    rows = [np.subtract(_final(run)["prompts"], _final(other)["prompts"]).tolist() for run, other in pairs]
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
