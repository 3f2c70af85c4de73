"""Solvers of the deterministic steps, those that are not trained: Euler, and the multistep solvers UniPC and
DPM-Solver++.

A multistep solver remembers earlier steps, so a walk along the grid has a state. What it remembers ends at a
stochastic step, after which the sample is no longer on the path that was remembered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from flashgrpo.settings import FORBID_EXTRA


@runtime_checkable
class Walk(Protocol):
    """One or more samples on their way along a grid, all at the same step."""

    def step(self, k: int, x: Any, v: Any) -> Any:
        """The deterministic step from point k of the grid to the walk's next, of x_k (B, ...) and its velocity; x_next
        (B, ...) in float32.

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
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def walk(self, grid: Any, points: Sequence[int]) -> Walk:
        """Return a walk along the grid that stops at these points, rising, and ends at the grid's end."""
        from flashgrpo.processes.flow.walks import EulerWalk  # needs torch, which settings do without

        return EulerWalk(grid, points)


@dataclass(frozen=True)
class UniPC:
    """The multistep predictor-corrector UniPC (arXiv 2302.04867), through diffusers' scheduler; Wan's own sampler.

    Args:
        order: steps that are looked back at, at most; 2 is what Wan's checkpoints are sampled with.
    """

    order: Literal[1, 2, 3] = 2
    kind: Literal["unipc"] = "unipc"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def walk(self, grid: Any, points: Sequence[int]) -> Walk:
        """Return a walk along the grid that stops at these points, rising, and ends at the grid's end."""
        from flashgrpo.processes.flow.walks import UniPCWalk

        return UniPCWalk(grid, points, self.order)


@dataclass(frozen=True)
class DpmSolver:
    """The multistep solver DPM-Solver++ (arXiv 2211.01095), through diffusers' scheduler; DiffusionNFT's rollouts.

    Args:
        order: steps that are looked back at, at most.
    """

    order: Literal[1, 2, 3] = 2
    kind: Literal["dpm"] = "dpm"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def walk(self, grid: Any, points: Sequence[int]) -> Walk:
        """Return a walk along the grid that stops at these points, rising, and ends at the grid's end."""
        from flashgrpo.processes.flow.walks import DpmSolverWalk

        return DpmSolverWalk(grid, points, self.order)


Solver = Euler | UniPC | DpmSolver
