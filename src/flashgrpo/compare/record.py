"""What a comparison reads of one run: from its run directory, and once it has ended from one small file beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flashgrpo.compare import statistics
from flashgrpo.compare.folder import RunFiles
from flashgrpo.errors import UserError
from flashgrpo.files import read_object, read_text, write_json
from flashgrpo.jsontext import finite
from flashgrpo.report.record import Row, column
from flashgrpo.run import checkpoint
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.lines import Entries, Interval, Number, Numbers, Real, mistake, read_lines
from flashgrpo.scoring.heldout import selected

NOT_TRAINING = ("evaluate", "checkpoint", "total")  # phases that a comparison by seconds leaves out
KEPT = (
    *("reward", "reward_std", "grad_norm", "drift", "ratio_mean", "ratio_max_dev", "clip_fraction", "approx_kl", "kl"),
    *("skipped_steps", "dropped_groups"),  # in lines of updates that had some
)
UPDATE_NEEDS = ("compute", "seconds", "samples", "grad_norm_by_step")
ENDED = ("complete", "ended early")


class _Point(Entries):
    update: int
    reward: Real
    difference: Real
    prompts: list[Number]  # None where a prompt was left out
    watched: dict[str, Real]
    base_watched: dict[str, Real]
    interval: Interval | None


class _Evaluated(_Point):
    compute: int
    seconds: Real


class _Updated(Entries):
    update: int
    rollout_compute: int
    update_compute: int
    seconds: Real
    samples: int
    update_seconds: Number
    reward: Number


class _Gradients(Entries):
    over_updates: Number
    over_steps: Number
    by_step: Numbers


class _Record(Entries):
    """What is read of seed-S.json."""

    algorithm: str
    seed: int
    status: str
    trained_on: int
    points: list[_Evaluated]
    updates: list[_Updated]
    confirmed: _Point | None
    collapse: str | None
    gradients: _Gradients
    environment: dict[str, Any]


def read_run(files: RunFiles, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Read one run, from its record where it has ended, else from the run directory.

    Raises:
        UserError: the record is damaged.
    """
    if not files.record.exists():
        return _rounded(_read_directory(files, entry))
    record = read_object(files.record)
    if wrong := mistake(_Record, record):
        raise UserError(f"{files.record} is damaged ({wrong}); put it back, or remove it where {files.path} is whole")
    return record


def keep_record(files: RunFiles, entry: Mapping[str, Any]) -> None:
    """Write the record of a run that has ended, unless it has one."""
    if not files.record.exists() and is_done(files, entry):
        write_json(files.record, read_run(files, entry))


def _rounded(value: Any) -> Any:
    """Return the JSON value with 7 significant digits, as many as float32 has."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


def _read_directory(files: RunFiles, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Read how a run ended, and every evaluation and update, by the compute and the seconds spent until then."""
    metrics, evaluations = (
        read_lines(files.path / "metrics.jsonl", UPDATE_NEEDS),
        read_lines(files.path / "evaluations.jsonl", ("watch",)),
    )
    each = entry["settings"]["evaluation"]["samples_per_prompt"]
    _check_samples(files, evaluations, each)
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
                "grad_norm_by_step": line["grad_norm_by_step"] or {},
            }
        )
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


def _check_samples(files: RunFiles, evaluations: Sequence[Row], each: int) -> None:
    if uneven := [line["update"] for line in evaluations if len(line["samples"]) % each]:
        raise UserError(
            f"{files.path}/evaluations.jsonl: after update {uneven[0]} a prompt has fewer samples than {each}; "
            "something else changed it"
        )


def _point(line: Row, each: int) -> dict[str, Any]:
    kept = ("update", "reward", "base_reward", "difference", "interval", "rewards")
    watched = ("watched", "base_watched", "watched_intervals")
    return {**{key: line[key] for key in (*kept, *watched)}, "prompts": _by_prompt(line["samples"], each)}


def _by_prompt(samples: Sequence[Row], each: int) -> list[float]:
    """Return the difference to the base model on every prompt, the mean over its samples; nan where one has none."""
    differences = column(samples, "reward") - column(samples, "base_reward")
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
    if files.record.exists():
        return True
    run = read_run(files, entry)
    saved = checkpoint.updates(files.path / "checkpoints")[-1:]
    if run["selected"] and not run["confirmed"] and entry["settings"]["model"]["train"]["kind"] == "lora":
        return False
    return run["status"] in ENDED and saved == [run["points"][-1]["update"]] and not files.busy
