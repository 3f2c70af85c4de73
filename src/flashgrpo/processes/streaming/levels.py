"""The few noise levels at which a distilled model draws a block, and the walk through them."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

TIMESTEPS = (1000, 750, 500, 250)
"""Of 1000, before the shift: those that Self-Forcing, LongLive and KVPO were distilled at."""


def shifted_levels(shift: float = 5.0, timesteps: Sequence[int] = TIMESTEPS) -> tuple[float, ...]:
    """Return `sigma = shift u / (1 + (shift - 1) u)` for each `u = timestep / 1000`.

    Shift 5 gives 1, .9375, .83333, .625; the first is exactly 1 with any shift.
    """
    return tuple(1.0 if u == 1 else shift * u / (1 + (shift - 1) * u) for u in (time / 1000 for time in timesteps))


def walk_levels(
    velocity: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    renoise: Sequence[Tensor | None],
    levels: Sequence[float],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw a block: yield its noisy input and its prediction `x0_hat = x - sigma v` at each level.

    The last prediction is the block. What is between levels says `next_input`.

    Args:
        velocity: of (x, sigma).
        noise: (B, C, F, H, W), the input at the first level, which is 1.
        renoise: eps of each level but the first, shaped as `noise`, or None.
    """
    x = noise
    for sigma, lower, eps in zip(levels, (*levels[1:], None), (*renoise, None), strict=True):
        x0_hat = x - sigma * velocity(x, sigma)
        yield x, x0_hat
        if lower is not None:
            x = next_input(x, x0_hat, sigma, lower, eps)


def next_input(x: Tensor, x0_hat: Tensor, sigma: float, lower: float, eps: Tensor | None) -> Tensor:
    """Return the input at the next lower level: the prediction, noised again; without noise, on a straight line to it.

    That line is `x - (sigma - lower) v`, a step of Euler's, or of a network that predicts mean velocities (2605.13724).
    """
    if eps is None:
        return (lower / sigma) * x + (1 - lower / sigma) * x0_hat
    return (1 - lower) * x0_hat + lower * eps
