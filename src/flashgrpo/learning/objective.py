"""What an update makes of the scores of its terms: objectives, as pure functions of columns of numbers.

With the ratio `r = exp(score - old)` of a replayed term, its advantage A and its weight w, the clipped objective is

    L = mean_i max( -w A r, -w A clip(r, 1 - low, 1 + high) ) + kl_coef KL_i        (PPO, arXiv 1707.06347, eq. 7)

Log-probabilities of videos are means over the latent dims, about two million of them, so ratios stay extremely near 1
and the published clip range is 1e-3. A, w and the old score are constants; the gradient goes through the new score.

Objectives are settings, too, so this file is free of torch: they calculate with the tensors that they are given.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float32

from flashgrpo.settings import FORBID_EXTRA

Rows = Float32[Any, " batch"]
ClipRange = float | tuple[float, float]
FAR = 80.0  # a log-ratio whose exp float32 still holds


@dataclass(frozen=True)
class Clipped:
    """The clipped surrogate, and a penalty on the KL divergence to the base model.

    Args:
        clip_range: c of clip(ratio, 1 - c, 1 + c), or a pair (low, high).
        kl_coef: weight of the KL divergence to the base model; 0 computes none.
    """

    clip_range: ClipRange = 1e-3
    kl_coef: float = 0.0
    coupled: ClassVar[bool] = False
    kind: Literal["clipped"] = "clipped"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        bounds = self.clip_range if isinstance(self.clip_range, tuple) else (self.clip_range,)
        if not all(0 < bound < math.inf for bound in bounds):
            raise ValueError(f"clip_range must be greater than 0 and finite, not {self.clip_range}")
        if not 0 <= self.kl_coef < math.inf:
            raise ValueError(f"kl_coef must be at least 0 and finite, not {self.kl_coef}")

    @property
    def columns(self) -> Sequence[str]:
        """What a replay has to bring besides the score."""
        return ("kl",) if self.kl_coef else ()

    @property
    def needs_reference(self) -> bool:
        """Whether a column is computed by the base model's weights."""
        return self.kl_coef > 0

    def losses(self, score: Rows, old: Rows, advantage: Rows, weight: Rows, columns: Mapping[str, Rows]) -> Rows:
        """Return the loss of each of T terms, (T,)."""
        losses = policy_losses(score, old, advantage, weight, self.clip_range)
        return losses + self.kl_coef * columns["kl"] if self.kl_coef else losses

    def metrics(self, score: Rows, old: Rows) -> dict[str, float]:
        """Return how far the policy has moved from the one that drew: `ratio_metrics` of T terms."""
        return {name: float(value) for name, value in ratio_metrics(score, old, self.clip_range).items()}


def policy_losses(log_prob: Rows, old_log_prob: Rows, advantage: Rows, weight: Rows, clip_range: ClipRange) -> Rows:
    """Return the clipped loss of each of T terms, (T,); all inputs are (T,), `clip_range` is c or a pair (low, high).

    Micro-batches that add up `policy_losses(...).sum() / T` give the gradient of the whole batch, whatever their sizes.

    With c = 0.2, w = 1: A = 1 and r = 1.5 give max(-1.5, -1.2) = -1.2, constant, since the sample has been made likely
    enough; A = -1 and r = 1.5 give max(1.5, 1.2) = 1.5, and the gradient keeps making it less likely.
    """
    _check_rows(log_prob=log_prob, old_log_prob=old_log_prob, advantage=advantage, weight=weight)
    low, high = _bounds(clip_range)
    log_ratio, gain = log_prob - old_log_prob.detach(), (weight * advantage).detach()
    clipped_anyway = (gain >= 0) & (log_ratio > FAR)  # where exp would be inf, and its derivative 0 * inf
    ratio = log_ratio.masked_fill(clipped_anyway, FAR).exp()
    return (-gain * ratio).maximum(-gain * ratio.clamp(low, high))


def ratio_metrics(log_prob: Rows, old_log_prob: Rows, clip_range: ClipRange) -> dict[str, Float32[Any, ""]]:
    """Return how far the policy has moved from the one that drew, as 0-d tensors.

    - `ratio_mean`: mean of r; 1 up to sampling noise while old and new policy are close.
    - `ratio_max_dev`: largest |r - 1|. Before the first optimizer step it is 0, or else replay differs from rollout.
    - `clip_fraction`: share of ratios outside the clip range, on either side.
    - `approx_kl`: mean of (r - 1) - log r, which is never negative: an estimate of KL(old || new) from samples of old.

    Metrics of a whole update: collect the log-probabilities of its micro-batches and call this once.
    """
    _check_rows(log_prob=log_prob, old_log_prob=old_log_prob)
    low, high = _bounds(clip_range)
    log_ratio = (log_prob - old_log_prob).detach()
    ratio = log_ratio.exp()
    return {
        "ratio_mean": ratio.mean(),
        "ratio_max_dev": (ratio - 1).abs().max(),
        "clip_fraction": ((ratio < low) | (ratio > high)).float().mean(),
        "approx_kl": (log_ratio.expm1() - log_ratio).mean(),
    }


def _bounds(clip_range: ClipRange) -> tuple[float, float]:
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    if not (0 < low < math.inf and 0 < high < math.inf):
        raise ValueError(f"clip_range is a number above 0, or a pair (low, high) of such numbers, got {clip_range}")
    return 1 - low, 1 + high


def _check_rows(**rows: Any) -> None:
    """Every tensor is (T,) with one T > 0: (T, 1) beside (T,) would broadcast to (T, T) and average the wrong pairs."""
    shapes = {name: tuple(row.shape) for name, row in rows.items()}
    if len(set(shapes.values())) != 1 or len(first := next(iter(shapes.values()))) != 1 or first[0] == 0:
        raise ValueError(f"the loss takes one value per term, all of shape (T,), got {shapes}")
