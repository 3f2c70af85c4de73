"""Every step of a sigma grid as a Gaussian: mean, density, KL and rectification follow from two numbers a step.

A noise kind (`noise.py`) gives the two, `c` and `std`; with x0_hat = x - sigma v and eps_hat = x + (1 - sigma) v,

    x_next ~ N( (1 - sigma_next) x0_hat + c eps_hat,  std^2 I )
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from flashgrpo.processes.calls import mean_of_rows

StepIndex = int | Int[Tensor, " batch"]
Latents = Float[Tensor, "batch *latent"]
Latents32 = Float32[Tensor, "batch *latent"]


def checked_sigmas(sigmas: Float[Tensor, " points"]) -> Float64[Tensor, " points"]:
    """The grid `1 >= sigma_0 > sigma_1 > ... > sigma_N >= 0` in float64, or a ValueError that says what is wrong."""
    sigmas = sigmas.detach().double()
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"a grid of sigmas is a row of two or more values, not of shape {tuple(sigmas.shape)}")
    if not bool(torch.isfinite(sigmas).all()) or sigmas.min() < 0 or sigmas.max() > 1:
        raise ValueError(f"sigmas have to be finite and within [0, 1], got {sigmas.tolist()}")
    if not bool((sigmas.diff() < 0).all()):
        raise ValueError(f"sigmas have to fall at every step, got {sigmas.tolist()}")
    return sigmas


@dataclass(frozen=True, eq=False)
class StepTable:
    """Every step of a grid as a Gaussian: `x_next ~ N(to_x x + to_v v, std^2 I)`.

    Shapes: a grid of N + 1 `sigmas` has N steps; every coefficient is (N,), float64. Latents are (B, ...) with whatever
    follows the batch; `k` names the step, one int for all rows or one int per row, (B,). Everything that has a batch is
    computed and returned in float32, whatever the dtype of the input. Equal inputs give equal bits, whichever form `k`
    has and whichever other rows share the batch, so that the ratio of a replayed step is exactly 1.
    """

    sigmas: Float64[Tensor, " points"]
    c: Float64[Tensor, " steps"]
    std: Float64[Tensor, " steps"]

    @property
    def num_steps(self) -> int:
        return len(self.std)

    @property
    def to_x(self) -> Float64[Tensor, " steps"]:
        """Factor of x in the mean, `1 - sigma_next + c`; 1 for an ODE step."""
        return 1 - self.sigmas[1:] + self.c

    @property
    def to_v(self) -> Float64[Tensor, " steps"]:
        """Factor of v in the mean, `b = c (1 - sigma) - sigma (1 - sigma_next)`: negative, -d for an ODE step."""
        return self.c * (1 - self.sigmas[:-1]) - self.sigmas[:-1] * (1 - self.sigmas[1:])

    @property
    def rectification(self) -> Float64[Tensor, " steps"]:
        """`1 / lambda = std / |b|`, the inverse of the gradient's scale (Flash-GRPO, arXiv 2605.15980).

        By the chain rule `|d log_prob / d v| = lambda |xi| / D` per coordinate of D latent dims: steps with a large
        lambda drown the others, for no reason that has to do with the reward. 0 where a step is deterministic.
        """
        return self.std / self.to_v.abs()

    def mean(self, k: StepIndex, x: Latents, v: Latents) -> Latents32:
        """Return the mean of x_next, `(1 - sigma_next) x0_hat + c eps_hat`, collected into `to_x x + to_v v`."""
        k = self._steps(k, x, v)
        return _rows(self.to_x, k, x) * x.float() + _rows(self.to_v, k, x) * v.float()

    def sample(self, k: StepIndex, x: Latents, v: Latents, noise: Latents) -> Latents32:
        """`mean + std noise`, with standard normal `noise` from the caller, who owns the seeds."""
        k = self._steps(k, x, v, noise)
        return self.mean(k, x, v) + _rows(self.std, k, x) * noise.float()

    def log_prob(self, k: StepIndex, x_next: Latents, x: Latents, v: Latents) -> Float32[Tensor, " batch"]:
        """Log-density of x_next, **averaged** over the D latent dims (Flow-GRPO, arXiv 2505.05470, its code):

            mean( -(x_next - mean)^2 / (2 std^2) ) - log std - log(2 pi) / 2

        With std 0.5 and x_next - mean = (0.5, -1): `-(1 + 4)/4 + 0.6931 - 0.9189 = -1.4758`.
        """
        k = self._steps(k, x, v, x_next, stochastic=True)
        xi = (x_next.float() - self.mean(k, x, v)) / _rows(self.std, k, x)
        log_scale = self.std.log() + 0.5 * math.log(2 * math.pi)
        energy = mean_of_rows(xi.square())
        return -0.5 * energy - _rows(log_scale, k, like=energy)

    def kl(self, k: StepIndex, v: Latents, v_ref: Latents) -> Float32[Tensor, " batch"]:
        """KL between the steps that `v` and `v_ref` take from one x, averaged over the latent dims.

        Two Gaussians of one std, whose means are `b (v - v_ref)` apart: `mean( b^2 (v - v_ref)^2 / (2 std^2) )`.
        """
        k = self._steps(k, v, v_ref, stochastic=True)
        distance = mean_of_rows((v.float() - v_ref.float()).square())
        return _rows(0.5 / self.rectification.square(), k, like=distance) * distance

    def _steps(self, k: int | Tensor, *latents: Tensor, stochastic: bool = False) -> Int[Tensor, " batch"]:
        """`k` as one index per row, after the shapes, the range and (if asked) the noise of every step are checked."""
        shapes = {tuple(latent.shape) for latent in latents}
        if len(shapes) != 1 or not (shape := shapes.pop()) or 0 in shape:
            raise ValueError(f"latents of one step need one shape (B, ...), got {[tuple(x.shape) for x in latents]}")
        if isinstance(k, int):
            k = torch.full(shape[:1], k)
        if k.shape != shape[:1] or k.is_floating_point() or k.dtype == torch.bool:
            raise ValueError(f"k is an int or {shape[0]} integers, not {k.dtype} of shape {tuple(k.shape)}")
        k = k.to(self.sigmas.device, torch.int64)
        outside = k[(k < 0) | (k >= self.num_steps)]
        if len(outside):
            raise ValueError(f"step {int(outside[0])} is outside the grid, whose steps are 0 to {self.num_steps - 1}")
        if stochastic and len(silent := k[self.std[k] == 0]):
            raise ValueError(f"step {int(silent[0])} is deterministic (std 0), so it has no density")
        return k


def _rows(values: Float64[Tensor, " steps"], k: Int[Tensor, " batch"], like: Tensor) -> Float32[Tensor, "batch *ones"]:
    """`values[k]` in float32, shaped (B, 1, ...) to multiply latents `like` these, on their device."""
    return values[k].float().to(like.device, non_blocking=True).reshape(-1, *[1] * (like.ndim - 1))
