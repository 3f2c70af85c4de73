"""Re-noised samples: the error of a velocity at a noise level of a finished sample.

A finished sample x0 is noised anew, `x_t = (1 - t) x0 + t eps`, and the network is asked for the velocity, whose target
is `u = eps - x0`. With `d = v - u` and l = mean(d^2) over the latent dims, an error E is one of

    uniform, t, t2   l, t l, t^2 l
    huber, ghuber    t (sqrt(l + 1e-10) - 1e-5), (t / p) ((l + 1e-10)^p - 1e-10^p) with p = 1/4
    self-normalized  mean((x0_hat - x0)^2) / sg[ mean |x0_hat - x0| ] = t^2 l / sg[ t mean |d| ],  x0_hat = x_t - t v

uniform, t, t2, huber and ghuber are AWM's (arXiv 2509.25050), self-normalized is that of DiffusionNFT (2509.16117) and
V-GRPO (2604.23380); sg is a constant for the gradient, never below 1e-5. The score of a sample at a level is -E. At
v = v_old the gradient of A score is the same for V-GRPO, DiffusionNFT and AWM with w(t) = t^2 / mean |x0_hat - x0|.

Tensors of any floating type are computed in their own.
"""

import math

from jaxtyping import Float
from torch import Tensor

from flashgrpo.processes.calls import mean_of_rows
from flashgrpo.processes.settings import ErrorKind

Rows = Float[Tensor, " batch"]
Latents = Float[Tensor, "batch *latent"]
SMALL = 1e-10  # added to l by AWM's code
POWER = 0.25  # p of ghuber
FLOOR = 1e-5  # of what the error is divided by


def error(kind: ErrorKind, sigma: Rows, v: Latents, u: Latents) -> Rows:
    """Return the error E of each row of velocities, (B,), at its noise level; see the head of this file.

    Example of "ghuber": at t = 0.6 its derivative by l, up to the 1e-10, is t l^(p - 1): 1.69706 at l = 1/4, 0.6 at 1.
    """
    d = v - u
    mean_square = mean_of_rows(d.square())
    t = sigma.to(mean_square)
    if kind == "uniform":
        return mean_square
    if kind == "t":
        return t * mean_square
    if kind == "t2":
        return t**2 * mean_square
    if kind == "huber":
        return t * ((mean_square + SMALL).sqrt() - math.sqrt(SMALL))
    if kind == "ghuber":
        return t / POWER * ((mean_square + SMALL) ** POWER - SMALL**POWER)
    return t**2 * mean_square / (t * mean_of_rows(d.detach().abs())).clamp(min=FLOOR)


def distance(v: Latents, other: Latents) -> Rows:
    """Return mean((v - other)^2) of each row: how far two policies are apart, as a penalty."""
    return mean_of_rows((v - other).square())


def contrast(kind: ErrorKind, sigma: Rows, v: Latents, v_old: Latents, u: Latents, beta: float) -> tuple[Rows, Rows]:
    """Return the errors of v+ and of its mirror image v-: beta v + (1 - beta) v_old and (1 + beta) v_old - beta v."""
    step = beta * (v - v_old)
    return error(kind, sigma, v_old + step, u), error(kind, sigma, v_old - step, u)
