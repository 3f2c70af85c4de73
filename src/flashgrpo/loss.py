"""The clipped policy objective: the ratio of each transition, and its weight.

With the ratio `r = exp(log_prob - old_log_prob)` of a replayed transition, its advantage A and its weight w,

    L = mean_i max( -w A r, -w A clip(r, 1 - low, 1 + high) )        (PPO, arXiv 1707.06347, eq. 7)

Log-probabilities are means over the latent dims, about two million in a video, so ratios stay extremely near 1 and the
published clip range is 1e-3. A, w and the old log-probability are constants; the gradient goes through `log_prob`.

This file knows nothing of Gaussian steps except what it asks a `StepTable` for. Its choices meet in the gradient of the
first optimizer step, where r is 1: `|d log r / d v| = s |xi| / D` per coordinate of D latent dims, so a step counts for
w s. With b, std and lambda = |b| / std as in noise.py, and d the step's length in sigma:

    weighting      w, up to its mean       w s with PlainRatio, s = lambda      with NormalizedRatio, s = |b|
    Uniform        1                       |b| / std                            |b|
    Rectified      std / |b|               1, even                              std
    NoiseLevel     std                     |b|                                  std |b|
    StepLength     1 / d                   |b| / (d std)                        |b| / d, nearly even

The last entry is GRPO-Guard. For `FlowSde` |b| / d is 1 + eta^2 / 2 at every step but the first: it then weighs steps
as Flash-GRPO (the "even" entry) does, and differs in which ratios are clipped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float32, Float64, Int
from torch import Tensor

from flashgrpo.noise import FORBID_EXTRA, Latents, StepTable

Rows = Float32[Tensor, " batch"]
ClipRange = float | tuple[float, float]


@dataclass(frozen=True)
class Uniform:
    """Every transition weighs 1."""

    kind: Literal["uniform"] = "uniform"
    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_EXTRA

    def weights(
        self, table: StepTable, candidates: Sequence[int], k: Int[Tensor, " batch"]
    ) -> Float32[Tensor, " batch"]:
        return torch.ones(k.shape, device=k.device)


@dataclass(frozen=True)
class Rectified:
    """Temporal gradient rectification, `w = (1/lambda_k) / mean(1/lambda)` (Flash-GRPO, arXiv 2605.15980).

    The gradient of a step's log-probability is lambda_k times larger than its noise alone explains; the weight takes
    that out, and falls with k. The mean keeps the size of an update: over the "window" of steps that can be drawn
    (independent of the batch, of micro-batches and of ranks), or over the k of this "update" (the published code, which
    took a micro-batch of all ranks for it; pass the whole update's k here and slice the weights).

    With 1/lambda = 3, 2, 1 at candidates 0, 1, 2, k = (0, 0) weighs (1.5, 1.5) over the window, (1, 1) over the update.
    """

    over: Literal["window", "update"] = "window"
    kind: Literal["rectified"] = "rectified"
    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        if self.over not in ("window", "update"):
            raise ValueError(f"over of Rectified is 'window' or 'update', got {self.over!r}")

    def weights(
        self, table: StepTable, candidates: Sequence[int], k: Int[Tensor, " batch"]
    ) -> Float32[Tensor, " batch"]:
        reference = k if self.over == "update" else torch.tensor(candidates, dtype=torch.int64)
        return _relative(table.rectification, table, k, reference)


@dataclass(frozen=True)
class NoiseLevel:
    """Noise-aware weighting, `w = std_k / mean(std)` (TempFlow-GRPO, arXiv 2508.04324).

    The `Norm(sigma_t sqrt(dt))` of the paper's policy objective: the noise of a step, scaled to a mean of 1, so that a
    step that explores more counts for more. Its code multiplies std with a constant for each model instead (2.25 for
    SD3.5, 1.73 for FLUX). The mean is over the window of steps that can be drawn, so a weight does not depend on the
    batch, on micro-batches or on ranks.

    With std 0.3, 0.2, 0.1 at candidates 0, 1, 2, k = (0, 2) weighs (1.5, 0.5).
    """

    kind: Literal["noise-level"] = "noise-level"
    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_EXTRA

    def weights(
        self, table: StepTable, candidates: Sequence[int], k: Int[Tensor, " batch"]
    ) -> Float32[Tensor, " batch"]:
        return _relative(table.std, table, k, torch.tensor(candidates, dtype=torch.int64))


@dataclass(frozen=True)
class StepLength:
    """Gradient reweighting, `w = (1/d_k) / mean(1/d)`, d = sigma - sigma_next (GRPO-Guard, arXiv 2510.22319, eq. 12).

    Meant for `NormalizedRatio`, whose gradient grows with the step's length. The paper's factor is 1/d itself; here it
    is scaled to a mean of 1 over the window, so that the size of an update does not depend on the number of steps.

    With d = 0.25, 0.25, 0.5 at candidates 0, 1, 2, k = (0, 2) weighs (1.2, 0.6).
    """

    kind: Literal["step-length"] = "step-length"
    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_EXTRA

    def weights(
        self, table: StepTable, candidates: Sequence[int], k: Int[Tensor, " batch"]
    ) -> Float32[Tensor, " batch"]:
        return _relative(-1 / table.sigmas.diff(), table, k, torch.tensor(candidates, dtype=torch.int64))


def _relative(
    scale: Float64[Tensor, " steps"], table: StepTable, k: Int[Tensor, " batch"], reference: Int[Tensor, " any"]
) -> Float32[Tensor, " batch"]:
    """`scale[k] / mean(scale[reference])`, where every step is stochastic."""
    steps, reference = (index.to(table.sigmas.device, torch.int64) for index in (k, reference))
    if len(reference) == 0 or len(steps) == 0:
        raise ValueError("weights need at least one candidate step and one transition")
    for step in {*steps.tolist(), *reference.tolist()}:
        if not 0 <= step < table.num_steps or table.std[step] == 0:
            raise ValueError(f"step {step} is not a stochastic step of this grid, so it has no weight")
    return (scale[steps] / scale[reference].mean()).float().to(k.device)


@dataclass(frozen=True)
class PlainRatio:
    """`log r = log_prob - old_log_prob`, the importance ratio as it is.

    `scores` of a ratio gives two rows whose difference is the log-ratio, to take the places of new and old
    log-probability in the objective and in its metrics.
    """

    needs_old_velocity: ClassVar[bool] = False
    kind: Literal["plain"] = "plain"
    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_EXTRA

    def scores(
        self,
        table: StepTable,
        k: Int[Tensor, " batch"],
        log_prob: Rows,
        old_log_prob: Rows,
        v: Latents,
        old_v: Latents,
    ) -> tuple[Rows, Rows]:
        return log_prob, old_log_prob


@dataclass(frozen=True)
class NormalizedRatio:
    """RatioNorm (GRPO-Guard, arXiv 2510.22319, eq. 8): the log-ratio without its bias, in units that all steps share.

    With mean_new = mean_old + shift and x_next = mean_old + std xi, the log-ratio, averaged over the latent dims, is

        log r = mean(xi shift) / std - mean(shift^2) / (2 std^2)

    The second term is -KL(old || new): negative whichever way the policy moves, so that ratios lie below 1 and the
    samples that should be clipped above are not. The first has 1 / std in its spread, so that one clip range is tight
    at one step and idle at another. Adding the KL and multiplying with std leaves

        log r' = std (log r + KL) = mean(xi shift)

    The paper writes sums over the D latent dims where this project (as the released code) has means: the exponent is D
    times smaller here, as it is for `PlainRatio`, and so is the clip range; the released code takes 2e-6 to 4e-6.
    Log-ratios are std times smaller than plain ones: choose `clip_range` anew.

    With std 0.5, xi = (1, -2) and shift (0.1, 0.1): log r = -0.05 / 0.5 - 0.01 / 0.5 = -0.12 and log r' = -0.05.
    """

    needs_old_velocity: ClassVar[bool] = True
    kind: Literal["normalized"] = "normalized"
    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_EXTRA

    def scores(
        self,
        table: StepTable,
        k: Int[Tensor, " batch"],
        log_prob: Rows,
        old_log_prob: Rows,
        v: Latents,
        old_v: Latents,
    ) -> tuple[Rows, Rows]:
        """`v` and `old_v` are the velocities of the new and the old policy at x_k.

        Where they are the same bits, and the log-probabilities are, the ratio is exactly 1.
        """
        std = table.std[k.to(table.std.device)].float().to(log_prob.device)
        log_ratio = std * (log_prob - old_log_prob.detach() + table.kl(k, v, old_v.detach()))
        return log_ratio, torch.zeros_like(log_ratio)


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


def policy_loss(
    log_prob: Rows, old_log_prob: Rows, advantage: Rows, weight: Rows, clip_range: ClipRange
) -> tuple[Float32[Tensor, ""], dict[str, Float32[Tensor, ""]]]:
    """The mean of `policy_losses`, a scalar to differentiate, and the `ratio_metrics` of the same transitions."""
    losses = policy_losses(log_prob, old_log_prob, advantage, weight, clip_range)
    return losses.mean(), ratio_metrics(log_prob, old_log_prob, clip_range)


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
