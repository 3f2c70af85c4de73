"""What the runs of a comparison say together: curves, levels, spread, collapses.

Numbers only: nothing here knows of files.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flashgrpo.formats import called
from flashgrpo.report.record import Row, Values

SMOOTHED = 10  # a run's training reward is looked at in this number of stretches


def curve(runs: Sequence[Row], axis: str) -> tuple[Values, Values]:
    """Held-out reward by compute or by seconds, evaluation by evaluation: x (n,) and a row for each run (runs, n).

    x is the mean over the runs that came so far. A run that ended early keeps its last reward.
    """
    if not runs:
        return np.zeros(0), np.zeros((0, 0))
    updates, spent, rewards = (
        [np.array([point[key] for point in run["points"]], dtype=np.float64) for run in runs]
        for key in ("update", axis, "reward")
    )
    grid = np.unique(np.concatenate(updates))
    x = np.array([np.interp(grid, u, s, right=np.nan) for u, s in zip(updates, spent, strict=True)])
    held = np.array([np.interp(grid, u, r) for u, r in zip(updates, rewards, strict=True)])
    return np.maximum.accumulate(np.nanmean(x, axis=0)), held


def first_reached(x: Values, y: Values, level: float) -> float | None:
    """Return the x at which the line through the points first comes to `level`, None where it never does.

    Example: x = 0, 10, 20 and y = 0, 1, 3 reach 2 at 15.
    """
    above = np.flatnonzero(y >= level)
    if not len(above):
        return None
    after = int(above[0])
    if after == 0:
        return float(x[0])
    before = after - 1
    share = (level - y[before]) / (y[after] - y[before])
    return float(x[before] + share * (x[after] - x[before]))


def gradient_spread(updates: Sequence[Row]) -> dict[str, Any]:
    """Measure how uneven a run's gradient norms are, as coefficients of variation (std / mean).

    `over_updates` is over the updates; `over_steps` over the denoising steps, of each step's mean norm, which is
    `by_step`: where it is large, some steps dominate the update and others vanish in it.
    """
    norms = [update["grad_norm"] for update in updates if update["grad_norm"] is not None]
    by_step: dict[str, list[float]] = {}
    for update in updates:
        for step, norm in update["grad_norm_by_step"].items():
            if norm is not None:
                by_step.setdefault(step, []).append(norm)
    means = {step: float(np.mean(by_step[step])) for step in sorted(by_step, key=int)}
    return {
        "over_updates": _variation(norms),
        "over_steps": _variation(list(means.values())),
        "by_step": means,
    }


def _variation(values: Sequence[float]) -> float | None:
    mean = float(np.mean(values)) if len(values) > 1 else 0.0
    return float(np.std(values)) / mean if mean > 0 else None


def collapse(run: Row) -> str | None:
    """Say why a run counts as collapsed, None where it does not. It does when

    - a gradient norm or a training reward was not finite, or the run failed over one; an optimizer step that was
      skipped, or an update whose groups were all dropped, has none and cost that update only;
    - a watched reward had fallen too far at its last evaluation (`max_fall`);
    - at its last evaluation the held-out reward lies below the base model's with its whole 95 % interval over prompts;
    - its training reward lost more than half of what it had gained: of about ten stretches of equal length (of at least
      three updates each), the last has a mean nearer to the first one's than to the best one's. Gain and loss both have
      to be more than three standard errors of the difference of two such means, or it is noise.
    """
    rewards = [update["reward"] for update in run["updates"] if update["reward"] is not None]
    if any(_is_broken(update) for update in run["updates"]):
        return "a gradient or a reward was not finite"
    if run["status"] == "failed" and "the gradient of optimizer step" in (run["reason"] or ""):
        return str(run["reason"])
    last = run["points"][-1] if run["points"] else None
    if last and last["watch"]:
        return str(last["watch"])
    if last and last["interval"] and last["interval"][1] < 0:
        low, high = last["interval"]
        return f"{called(run)} reward fell below the base by {-high:.3g} to {-low:.3g}"
    return _lost_its_gain(np.array(rewards, dtype=np.float64))


def _is_broken(update: Row) -> bool:
    """Whether an update has no gradient norm or no reward, and it was not left out for that."""
    counted = {"grad_norm": "skipped_steps", "reward": "dropped_groups"}
    return any(update[key] is None and not update.get(count) for key, count in counted.items())


def _lost_its_gain(rewards: Values) -> str | None:
    size = max(3, math.ceil(len(rewards) / SMOOTHED))
    if len(rewards) < 3 * size:
        return None
    stretches = rewards[len(rewards) % size :].reshape(-1, size)
    means = stretches.mean(axis=1)
    noise = 3 * math.sqrt(2 * float(stretches.var(axis=1, ddof=1).mean()) / size)
    best = int(means.argmax())
    gain, loss = float(means[best] - means[0]), float(means[best] - means[-1])
    if gain > noise and loss > noise and loss > gain / 2:
        return f"training reward fell from {means[best]:.3g} to {means[-1]:.3g}, having begun at {means[0]:.3g}"
    return None
