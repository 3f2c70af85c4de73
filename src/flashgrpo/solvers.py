"""Solvers of the deterministic steps, those that are not trained: Euler, and the multistep solver UniPC.

A multistep solver remembers earlier steps, so a walk along the grid has a state. What it remembers ends at a
stochastic step, after which the sample is no longer on the path that was remembered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from flashgrpo.noise import FORBID_EXTRA, Latents, Latents32, Ode
from flashgrpo.schedule import SigmaGrid


@runtime_checkable
class Walk(Protocol):
    """One or more samples on their way along a grid, all at the same step."""

    def step(self, k: int, x: Latents, v: Latents) -> Latents32:
        """The deterministic step from point k of the grid to the walk's next, of x_k (B, ...) and its velocity.

        Points come in their order.
        """
        ...

    def restart(self) -> None:
        """Forget what came before: the next step starts from a sample that this walk has not led to."""
        ...


@dataclass(frozen=True)
class Euler:
    """First-order steps of the probability-flow ODE, `x_next = x - (sigma_k - sigma_{k+1}) v`; the formula is Ode's."""

    kind: Literal["euler"] = "euler"
    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_EXTRA

    def walk(self, grid: SigmaGrid, points: Sequence[int]) -> Walk:
        """A walk along the grid that stops at these points, rising, and ends at the grid's end."""
        return _EulerWalk(_at(grid, points), points)


class _EulerWalk:
    def __init__(self, sigmas: Float[Tensor, " points"], points: Sequence[int]) -> None:
        self._table = Ode()(sigmas)
        self._number = {k: number for number, k in enumerate(points)}

    def step(self, k: int, x: Latents, v: Latents) -> Latents32:
        return self._table.mean(self._number[k], x, v)

    def restart(self) -> None:
        pass  # nothing is remembered


@dataclass(frozen=True)
class UniPC:
    """The multistep predictor-corrector UniPC (arXiv 2302.04867), through diffusers' scheduler; Wan's own sampler.

    Args:
        order: steps that are looked back at, at most; 2 is what Wan's checkpoints are sampled with.
    """

    order: Literal[1, 2, 3] = 2
    kind: Literal["unipc"] = "unipc"
    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_EXTRA

    def walk(self, grid: SigmaGrid, points: Sequence[int]) -> Walk:
        """A walk along the grid that stops at these points, rising, and ends at the grid's end."""
        return _UniPCWalk(_at(grid, points).float(), points, self.order)


class _UniPCWalk:
    def __init__(self, sigmas: Float[Tensor, " points"], points: Sequence[int], order: int) -> None:
        self._sigmas = sigmas.clamp(max=1 - 1e-6)  # the solver takes log(1 - sigma); the scheduler does the same
        self._number = {k: number for number, k in enumerate(points)}
        self._order = order
        self._scheduler: Any = None

    def step(self, k: int, x: Latents, v: Latents) -> Latents32:
        if self._scheduler is None:
            self._scheduler = self._begin(self._number[k])
        timestep = self._scheduler.timesteps[self._number[k]]
        return self._scheduler.step(v.float(), timestep, x.float(), return_dict=False)[0]

    def restart(self) -> None:
        self._scheduler = None

    def _begin(self, number: int) -> Any:
        from diffusers import UniPCMultistepScheduler  # takes seconds to import

        scheduler: Any = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=self._order
        )
        scheduler.set_timesteps(len(self._sigmas) - 1)
        scheduler.sigmas, scheduler.timesteps = self._sigmas, torch.arange(len(self._sigmas) - 1)
        scheduler.set_begin_index(number)
        return scheduler


def _at(grid: SigmaGrid, points: Sequence[int]) -> Float[Tensor, " points"]:
    """The sigmas of these points, and of the grid's end."""
    return grid.sigmas[[*points, grid.num_steps]]


Solver = Euler | UniPC
