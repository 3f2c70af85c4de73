"""The few noise levels at which a distilled model draws a block, and the walk through them."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

TIMESTEPS = (1000, 750, 500, 250)
"""Of 1000, before the shift: those that Self-Forcing, LongLive and KVPO were distilled at."""


def shifted_levels(shift: float = 5.0, timesteps: Sequence[int] = TIMESTEPS) -> tuple[float, ...]:
    """Return `sigma = shift u / (1 + (shift - 1) u)` for each `u = timestep / 1000`.

    Shift 5 gives 1, .9375, .83333, .625.
    """
    return tuple(shift * u / (1 + (shift - 1) * u) for u in (timestep / 1000 for timestep in timesteps))


def walk_levels(
    velocity: Callable[[Tensor, float], Tensor], noise: Tensor, renoise: Sequence[Tensor], levels: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw a block: yield its noisy input and its prediction `x0_hat = x - sigma v` at each level.

    Between levels the prediction is noised again, `x = (1 - sigma) x0_hat + sigma eps`. The last prediction is the
    block.

    Args:
        velocity: of (x, sigma).
        noise: (B, C, F, H, W), the input at the first level, which is 1.
        renoise: eps of each level but the first, shaped as `noise`.
    """
    x = noise
    for sigma, lower, eps in zip(levels, (*levels[1:], None), (*renoise, None), strict=True):
        x0_hat = x - sigma * velocity(x, sigma)
        yield x, x0_hat
        if lower is not None and eps is not None:
            x = (1 - lower) * x0_hat + lower * eps
