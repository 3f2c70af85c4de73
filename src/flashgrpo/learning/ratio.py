"""What objectives calculate with: ratios to the policy that drew, the clipped surrogate, softmax and sums by key."""

import math
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Shaped

from flashgrpo.settings import check_number

Rows = Float[Any, " batch"]
Columns = Mapping[str, Shaped[Any, " batch"]]
ClipRange = float | tuple[float, float]
FAR = 80.0  # a log-ratio whose exp float32 still holds


def policy_losses(log_prob: Rows, old_log_prob: Rows, advantage: Rows, weight: Rows, clip_range: ClipRange) -> Rows:
    """Return the clipped loss of each of T terms, (T,); all inputs are (T,), `clip_range` is c or a pair (low, high).

    Micro-batches that add up `policy_losses(...).sum() / T` give the gradient of the whole batch, whatever their sizes.

    With c = 0.2, w = 1: A = 1 and r = 1.5 give max(-1.5, -1.2) = -1.2, constant, since the sample has been made likely
    enough; A = -1 and r = 1.5 give max(1.5, 1.2) = 1.5, and the gradient keeps making it less likely.
    """
    check_rows(log_prob=log_prob, old_log_prob=old_log_prob, advantage=advantage, weight=weight)
    low, high = _bounds(clip_range)
    gain = (weight * advantage).detach()
    ratio = finite_ratio(log_prob - old_log_prob.detach(), gain)
    return (-gain * ratio).maximum(-gain * ratio.clamp(low, high))


def finite_ratio(log_ratio: Rows, gain: Rows) -> Rows:
    """Return the ratio of each of T terms, (T,): a constant beyond e^80, but where the term is to be less likely.

    There exp would be inf and a product with a gain of 0 NaN, of a term that is as likely as anybody can want.
    """
    return log_ratio.masked_fill((gain >= 0) & (log_ratio > FAR), FAR).exp()


def ratio_metrics(log_prob: Rows, old_log_prob: Rows, clip_range: ClipRange) -> dict[str, Float[Any, ""]]:
    """Return how far the policy has moved from the one that drew, as 0-d tensors.

    - `ratio_mean`: mean of r; 1 up to sampling noise while old and new policy are close.
    - `ratio_max_dev`: largest |r - 1|. Before the first optimizer step it is 0, or else replay differs from rollout.
    - `clip_fraction`: share of ratios outside the clip range, on either side.
    - `approx_kl`: mean of (r - 1) - log r, which is never negative: an estimate of KL(old || new) from samples of old.

    Metrics of a whole update: collect the log-probabilities of its micro-batches and call this once.
    """
    check_rows(log_prob=log_prob, old_log_prob=old_log_prob)
    low, high = _bounds(clip_range)
    ratio = (log_prob - old_log_prob).detach().exp()
    return moved(log_prob, old_log_prob) | {"clip_fraction": ((ratio < low) | (ratio > high)).float().mean()}


def moved(score: Rows, old: Rows) -> dict[str, Float[Any, ""]]:
    """Return the metrics of `ratio_metrics` that know of no clip range."""
    log_ratio = (score - old).detach()
    ratio = log_ratio.exp()
    return {
        "ratio_mean": ratio.mean(),
        "ratio_max_dev": (ratio - 1).abs().max(),
        "approx_kl": (log_ratio.expm1() - log_ratio).mean(),
    }


def log_softmax_by_key(values: Rows, key: Any, zero: bool = False) -> Rows:
    """Return the log-softmax of each of T terms over the terms of its key, (T,).

    Args:
        key: (T,) integers, which number the keys from 0.
        zero: each key has one term more, whose value is 0.
    """
    highest = max_by_key(values.detach(), key)[key]
    if zero:
        highest = highest.clamp(min=0)
    above = values - highest
    total = sum_by_key(above.exp(), key)
    return above - (total + (-highest).exp() if zero else total).log()


def sum_by_key(values: Rows, key: Any) -> Rows:
    """Return for each of T terms the sum over the terms of its key, (T,)."""
    return values.new_zeros(int(key.max()) + 1).index_add(0, key, values)[key]


def max_by_key(values: Rows, key: Any) -> Float[Any, " keys"]:
    """Return the largest value of each of K keys, (K,)."""
    return values.new_full((int(key.max()) + 1,), -math.inf).scatter_reduce(0, key, values, "amax")


def clip_pair(clip_range: ClipRange) -> tuple[float, float]:
    """Return (low, high) of a clip range."""
    return clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)


def check_clip_range(clip_range: ClipRange) -> None:
    """Refuse a clip range that is out of its bounds, with a ValueError."""
    for bound in clip_pair(clip_range):
        check_number("clip_range", bound)


def _bounds(clip_range: ClipRange) -> tuple[float, float]:
    check_clip_range(clip_range)
    low, high = clip_pair(clip_range)
    return 1 - low, 1 + high


def check_rows(**rows: Any) -> None:
    """Every tensor is (T,) with one T > 0: (T, 1) beside (T,) would broadcast to (T, T) and average the wrong pairs."""
    shapes = {name: tuple(row.shape) for name, row in rows.items()}
    if len(set(shapes.values())) != 1 or len(first := next(iter(shapes.values()))) != 1 or first[0] == 0:
        raise ValueError(f"the loss takes one value per term, all of shape (T,), got {shapes}")
