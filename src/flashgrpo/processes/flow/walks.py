"""Walks along a sigma grid by a solver: what `solvers.py` names, computed."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flashgrpo.processes.flow.noise import Ode
from flashgrpo.processes.flow.schedule import SigmaGrid
from flashgrpo.processes.flow.table import Latents, Latents32
from flashgrpo.types import to_device


class EulerWalk:
    def __init__(self, grid: SigmaGrid, points: Sequence[int]) -> None:
        self._table = Ode()(_at(grid, points))
        self._number = {k: number for number, k in enumerate(points)}

    def step(self, k: int, x: Latents, v: Latents) -> Latents32:
        return self._table.mean(self._number[k], x, v)

    def restart(self) -> None:
        pass  # nothing is remembered


class MultistepWalk(ABC):
    """A walk by one of diffusers' multistep schedulers, put on these sigmas."""

    def __init__(self, grid: SigmaGrid, points: Sequence[int], order: int) -> None:
        self._sigmas = (
            _at(grid, points).float().clamp(max=1 - 1e-6)
        )  # the solvers take log(1 - sigma); the schedulers do the same
        self._number = {k: number for number, k in enumerate(points)}
        self._order = order
        self._scheduler: Any = None

    def step(self, k: int, x: Latents, v: Latents) -> Latents32:
        if self._scheduler is None:
            self._sigmas = to_device(self._sigmas, x.device)  # once: the solver would fetch single numbers at each step
            self._scheduler = self._begin(self._number[k])
        timestep = self._scheduler.timesteps[self._number[k]]
        return self._scheduler.step(v.float(), timestep, x.float(), return_dict=False)[0]

    def restart(self) -> None:
        self._scheduler = None

    def _begin(self, number: int) -> Any:
        scheduler = self._made()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # DPM-Solver makes arrays of tensors, which numpy minds
            scheduler.set_timesteps(len(self._sigmas) - 1)
        scheduler.sigmas, scheduler.timesteps = self._sigmas, torch.arange(len(self._sigmas) - 1)
        scheduler.set_begin_index(number)
        return scheduler

    @abstractmethod
    def _made(self) -> Any:
        """The scheduler as it is made."""


class UniPCWalk(MultistepWalk):
    def _made(self) -> Any:
        from diffusers import UniPCMultistepScheduler  # takes seconds to import

        return UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=self._order
        )


class DpmSolverWalk(MultistepWalk):
    def _made(self) -> Any:
        from diffusers import DPMSolverMultistepScheduler  # takes seconds to import

        return DPMSolverMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            solver_order=self._order,
            final_sigmas_type="zero",
        )


def _at(grid: SigmaGrid, points: Sequence[int]) -> Float[Tensor, " points"]:
    """The sigmas of these points, and of the grid's end."""
    return grid.sigmas[[*points, grid.num_steps]]
