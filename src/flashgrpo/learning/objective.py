"""The clipped policy objective: the ratio of each term, its advantage and its weight.

With the ratio `r = exp(score - old)` of a replayed term, its advantage A and its weight w,

    L = mean_i max( -w A r, -w A clip(r, 1 - low, 1 + high) )        (PPO, arXiv 1707.06347, eq. 7)

Log-probabilities of videos are means over the latent dims, about two million of them, so ratios stay extremely near 1
and the published clip range is 1e-3. A, w and the old score are constants; the gradient goes through the new score.
"""

import math

import torch
from jaxtyping import Float32
from torch import Tensor

Rows = Float32[Tensor, " batch"]
ClipRange = float | tuple[float, float]


def policy_losses(
    log_prob: Rows, old_log_prob: Rows, advantage: Rows, weight: Rows, clip_range: ClipRange
) -> Float32[Tensor, " batch"]:
    """The loss of each of B transitions, (B,); all inputs are (B,), and `clip_range` is c or a pair (low, high).

    Micro-batches that add up `policy_losses(...).sum() / B` give the gradient of the whole batch, whatever their sizes.

    With c = 0.2, w = 1: A = 1 and r = 1.5 give max(-1.5, -1.2) = -1.2, constant, since the sample has been made likely
    enough; A = -1 and r = 1.5 give max(1.5, 1.2) = 1.5, and the gradient goes on to make it less likely.
    """
    _check_rows(log_prob=log_prob, old_log_prob=old_log_prob, advantage=advantage, weight=weight)
    low, high = _bounds(clip_range)
    ratio = torch.exp(log_prob - old_log_prob.detach())
    gain = (weight * advantage).detach()
    return torch.maximum(-gain * ratio, -gain * ratio.clamp(low, high))


@torch.no_grad()
def ratio_metrics(log_prob: Rows, old_log_prob: Rows, clip_range: ClipRange) -> dict[str, Float32[Tensor, ""]]:
    """How far the policy has moved from the one that sampled, as 0-d tensors.

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
        "approx_kl": (torch.expm1(log_ratio) - log_ratio).mean(),
    }


def _bounds(clip_range: ClipRange) -> tuple[float, float]:
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    if not (0 < low < math.inf and 0 < high < math.inf):
        raise ValueError(f"clip_range is a number above 0, or a pair (low, high) of such numbers, got {clip_range}")
    return 1 - low, 1 + high


def _check_rows(**rows: Tensor) -> None:
    """Every tensor is (B,) with one B > 0: (B, 1) beside (B,) would broadcast to (B, B) and average the wrong pairs."""
    shapes = {name: tuple(row.shape) for name, row in rows.items()}
    if len(set(shapes.values())) != 1 or len(first := next(iter(shapes.values()))) != 1 or first[0] == 0:
        raise ValueError(f"the loss takes one value per transition, all of shape (B,), got {shapes}")
