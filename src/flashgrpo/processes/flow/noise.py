"""Noise kinds: what one denoising step draws.

Rectified flow writes a latent at noise level `sigma` in [0, 1] as `x = (1 - sigma) x0 + sigma eps` with velocity
`v = eps - x0`, so a model that predicts `v` predicts both ends of the line:

    x0_hat  = x - sigma v              the clean latent
    eps_hat = x + (1 - sigma) v        the noise

A step from `sigma` down to `sigma_next` mixes the two anew and adds noise of its own, `xi ~ N(0, I)`:

    x_next = (1 - sigma_next) x0_hat + c eps_hat + std xi

Two numbers per step, `c` and `std`, are all that tells one noise kind from another. A kind is a small frozen dataclass;
called with a grid of sigmas it gives the `StepTable` (`table.py`) with the mean, density, KL and rectification of
every step. Kinds are settings, too, so this file is free of torch: they calculate with whatever tensor they get.

>>> table = LinearSde(eta=1.0)(torch.tensor([1.0, 0.75, 0.5, 0.0], dtype=torch.float64))
>>> table.std                                    # g sqrt(d) with g = 0.75 sigma, d = 0.25 0.25 0.5
tensor([0.3750, 0.2812, 0.2652], dtype=torch.float64)
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float, Float64

from flashgrpo.settings import FORBID_EXTRA, check_number

Sigmas = Float64[Any, " points"]
Steps = Float64[Any, " steps"]


class NoiseKind(ABC):
    """A function from a grid of sigmas to the `(c, std)` of each of its steps."""

    @abstractmethod
    def coefficients(self, sigmas: Sigmas) -> tuple[Steps, Steps]:
        """`(c, std)` of the steps of the grid `sigmas`, (N,) each for N + 1 sigmas."""

    def __call__(self, sigmas: Float[Any, " points"]) -> Any:
        """Return the `StepTable` of a grid, (N + 1,) falling sigmas within [0, 1]; other grids are a ValueError."""
        from flashgrpo.processes.flow.table import StepTable, checked_sigmas  # needs torch, which settings do without

        sigmas = checked_sigmas(sigmas)
        return StepTable(sigmas, *self.coefficients(sigmas))


def _sde(sigmas: Sigmas, g: Steps) -> tuple[Steps, Steps]:
    """One Euler-Maruyama step of the SDE that has diffusion `g` and the marginals of the flow (arXiv 2505.05470).

    `c = sigma_next - g^2 d / (2 sigma)` and `std = g sqrt(d)` with `d = sigma - sigma_next`. g = 0 is the ODE.
    """
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    d = sigma - sigma_next
    return sigma_next - g**2 * d / (2 * sigma), g * d.sqrt()


def _check_eta(kind: str, eta: float, at_most: float = 5.0) -> None:
    """Check eta; a step multiplies a latent by 1 - g^2 d / (2 sigma), and so a rollout by up to exp(eta^2 / 2)."""
    check_number(f"eta of the noise '{kind}'", eta, highest=at_most)


@dataclass(frozen=True)
class Ode(NoiseKind):
    """No noise: one Euler step of the probability-flow ODE, `c = sigma_next`, that is `x_next = x - d v`."""

    kind: Literal["ode"] = "ode"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def coefficients(self, sigmas: Sigmas) -> tuple[Steps, Steps]:
        return _sde(sigmas, 0 * sigmas[1:])


@dataclass(frozen=True)
class LinearSde(NoiseKind):
    """`g = eta (sigma_N + (sigma_1 - sigma_N) sigma)`; sigma_1 is the grid's second point, sigma_N its last.

    The diffusion of the released Flash-GRPO and of Flow-GRPO's Wan runs, with eta = 1.

    Args:
        eta: the strength of the noise, above 0 and at most 5.
    """

    eta: float = 1.0
    kind: Literal["linear"] = "linear"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        _check_eta(self.kind, self.eta)

    def coefficients(self, sigmas: Sigmas) -> tuple[Steps, Steps]:
        return _sde(sigmas, self.eta * (sigmas[-1] + (sigmas[1] - sigmas[-1]) * sigmas[:-1]))


@dataclass(frozen=True)
class FlowSde(NoiseKind):
    """`g = eta sqrt(sigma / (1 - sigma))`, the denominator never below `1 - sigma_1` (arXiv 2505.05470; 2507.21802).

    At sigma = 1 the formula is infinite, and close to 1 it is useless: 0.7 sqrt(0.99967 / 0.00033) = 38, a step of
    std 5. The published code takes the denominator of the second grid point only where sigma equals 1,
    and so misses grids that start at 0.99967 or 0.999999. Here it is `max(1 - sigma, 1 - sigma_1)`: the published value
    at sigma = 1 and from the second step on, and sane in between (0.99967 gives g = 5.3, std 0.69). On the published
    grid lambda then spreads 66x over the twenty steps; with the equality test it would be 387x.

    Args:
        eta: the strength of the noise, above 0 and at most 5.
    """

    eta: float = 0.7
    kind: Literal["flow"] = "flow"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        _check_eta(self.kind, self.eta)

    def coefficients(self, sigmas: Sigmas) -> tuple[Steps, Steps]:
        room = (1 - sigmas[:-1]).clamp(min=1 - float(sigmas[1]))
        return _sde(sigmas, self.eta * (sigmas[:-1] / room).sqrt())


@dataclass(frozen=True)
class ConstantSde(NoiseKind):
    """`g = eta` at every step, as in DanceGRPO (arXiv 2505.07818) with eta = 0.3.

    Args:
        eta: the strength of the noise, above 0 and at most 5.
    """

    eta: float = 0.3
    kind: Literal["constant"] = "constant"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        _check_eta(self.kind, self.eta)

    def coefficients(self, sigmas: Sigmas) -> tuple[Steps, Steps]:
        return _sde(sigmas, self.eta + 0 * sigmas[1:])


@dataclass(frozen=True)
class Cps(NoiseKind):
    """Coefficients-preserving sampling, CPS (arXiv 2509.05952).

    `std = sigma_next sin(eta pi / 2)` and `c = sqrt(sigma_next^2 - std^2) = sigma_next cos(eta pi / 2)`: old and new
    noise together have exactly the level that the grid asks for, none is left over, and the step onto sigma_next = 0 is
    deterministic. eta = 1 replaces all of the noise at every step. To first order in d these are the rows of the SDE.

    Args:
        eta: the share of the noise that is new, above 0 and at most 1.
    """

    eta: float = 0.7
    kind: Literal["cps"] = "cps"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        _check_eta(self.kind, self.eta, at_most=1.0)

    def coefficients(self, sigmas: Sigmas) -> tuple[Steps, Steps]:
        angle = self.eta * math.pi / 2
        return sigmas[1:] * math.cos(angle), sigmas[1:] * math.sin(angle)
