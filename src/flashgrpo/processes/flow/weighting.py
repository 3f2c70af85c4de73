"""How much each stochastic step counts: the weight of a transition, and the ratio that it is judged by.

These choices meet in the gradient of the first optimizer step, where the ratio r is 1: `|d log r / d v| = s |xi| / D`
per coordinate of D latent dims, so a step counts for w s. With b, std and lambda = |b| / std as in `table.py`, and d
the step's length in sigma:

    weighting      w, up to its mean       w s with PlainRatio, s = lambda      with NormalizedRatio, s = |b|
    Uniform        1                       |b| / std                            |b|
    Rectified      std / |b|               1, even                              std
    NoiseLevel     std                     |b|                                  std |b|
    StepLength     1 / d                   |b| / (d std)                        |b| / d, nearly even

The last entry is GRPO-Guard. For `FlowSde` |b| / d is 1 + eta^2 / 2 at every step but the first: it then weighs steps
as Flash-GRPO (the "even" entry) does, and differs in which ratios are clipped. All are settings, so this file is
free of torch: they calculate with the tensors of the `StepTable` that they are given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float, Float32, Float64, Int

from flashgrpo.settings import FORBID_EXTRA

Rows = Float32[Any, " batch"]
Latents = Float[Any, "batch *latent"]
StepTable = Any  # of table.py, which needs torch


@dataclass(frozen=True)
class Uniform:
    """Every transition weighs 1."""

    kind: Literal["uniform"] = "uniform"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def weights(self, table: StepTable, candidates: Sequence[int], k: Int[Any, " batch"]) -> Rows:
        return table.std.new_ones(k.shape).float().to(k.device)


@dataclass(frozen=True)
class Rectified:
    """Temporal gradient rectification, `w = (1/lambda_k) / mean(1/lambda)` (Flash-GRPO, arXiv 2605.15980).

    The gradient of a step's log-probability is lambda_k times larger than its noise alone explains; the weight takes
    that out, and falls with k. The mean keeps the size of an update. It is over the window of steps that can be drawn,
    so a weight does not depend on the batch, on micro-batches or on ranks; the published code takes it over a
    micro-batch of all ranks, where on one GPU with one sample the weight is always 1.

    With 1/lambda = 3, 2, 1 at candidates 0, 1, 2, k = (0, 2) weighs (1.5, 0.5).
    """

    kind: Literal["rectified"] = "rectified"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def weights(self, table: StepTable, candidates: Sequence[int], k: Int[Any, " batch"]) -> Rows:
        return _relative(table.rectification, table, candidates, k)


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
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def weights(self, table: StepTable, candidates: Sequence[int], k: Int[Any, " batch"]) -> Rows:
        return _relative(table.std, table, candidates, k)


@dataclass(frozen=True)
class StepLength:
    """Gradient reweighting, `w = (1/d_k) / mean(1/d)`, d = sigma - sigma_next (GRPO-Guard, arXiv 2510.22319, eq. 12).

    Meant for `NormalizedRatio`, whose gradient grows with the step's length. The paper's factor is 1/d itself; here it
    is scaled to a mean of 1 over the window, so that the size of an update does not depend on the number of steps.

    With d = 0.25, 0.25, 0.5 at candidates 0, 1, 2, k = (0, 2) weighs (1.2, 0.6).
    """

    kind: Literal["step-length"] = "step-length"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def weights(self, table: StepTable, candidates: Sequence[int], k: Int[Any, " batch"]) -> Rows:
        return _relative(-1 / table.sigmas.diff(), table, candidates, k)


def _relative(
    scale: Float64[Any, " steps"], table: StepTable, candidates: Sequence[int], k: Int[Any, " batch"]
) -> Rows:
    """`scale[k] / mean(scale[candidates])`, where every step is stochastic."""
    steps = k.to(table.sigmas.device).long()
    if len(candidates) == 0 or len(steps) == 0:
        raise ValueError("weights need at least one candidate step and one transition")
    for step in {*steps.tolist(), *candidates}:
        if not 0 <= step < table.num_steps or table.std[step] == 0:
            raise ValueError(f"step {step} is not a stochastic step of this grid, so it has no weight")
    return (scale[steps] / scale[list(candidates)].mean()).float().to(k.device)


@dataclass(frozen=True)
class PlainRatio:
    """`log r = log_prob - old_log_prob`, the importance ratio as it is.

    `scores` of a ratio gives two rows whose difference is the log-ratio, to take the places of new and old
    log-probability in the objective and in its metrics.
    """

    needs_old_velocity: ClassVar[bool] = False
    kind: Literal["plain"] = "plain"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def scores(
        self,
        table: StepTable,
        k: Int[Any, " batch"],
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
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def scores(
        self,
        table: StepTable,
        k: Int[Any, " batch"],
        log_prob: Rows,
        old_log_prob: Rows,
        v: Latents,
        old_v: Latents,
    ) -> tuple[Rows, Rows]:
        """`v` and `old_v` are the velocities of the new and the old policy at x_k.

        Where they are the same bits, and the log-probabilities are, the ratio is exactly 1.
        """
        std = table.std[k.to(table.std.device)].float().to(log_prob.device, non_blocking=True)
        log_ratio = std * (log_prob - old_log_prob.detach() + table.kl(k, v, old_v.detach()))
        return log_ratio, log_ratio.new_zeros(log_ratio.shape)
