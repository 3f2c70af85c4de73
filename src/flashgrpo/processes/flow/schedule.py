"""Sigma grids: the noise levels that sampling walks.

A grid belongs to a scheduler: "20 steps, shift 3" starts at 0.99967, 0.999999 or 1.0 depending on the class and on the
release of diffusers. So it is read from the scheduler that the checkpoint ships, and everything else in the package is
computed from it; no table of timesteps exists anywhere.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Shaped
from torch import Tensor

from flashgrpo.errors import UserError
from flashgrpo.processes.flow.table import checked_sigmas

ROUNDING = 1e-6  # by which a scheduler's float32 puts sigma_0 above 1 with some shifts


@dataclass(frozen=True, eq=False)
class SigmaGrid:
    """N denoising steps: the `sigmas` they walk, (N + 1,) float64, and the `timesteps` that the model is fed, (N,).

    >>> shifted_grid(num_steps=2, shift=3.0)       # u = 1, 1/2, 0; 3u / (1 + 2u) = 1, 3/4, 0
    SigmaGrid(sigmas=tensor([1.0000, 0.7500, 0.0000], dtype=torch.float64), timesteps=tensor([1000.,  750.]))
    """

    sigmas: Float64[Tensor, " points"]
    timesteps: Shaped[Tensor, " steps"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", checked_sigmas(self.sigmas))
        if self.timesteps.shape != (self.num_steps,):
            raise ValueError(f"{self.num_steps} steps need as many timesteps, not {tuple(self.timesteps.shape)}")

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1


def grid_from_scheduler(
    scheduler: Any,
    num_steps: int,
    shift: float | None = None,
    mu: float | None = None,
    spacing: Float64[np.ndarray, " steps"] | None = None,
) -> SigmaGrid:
    """The grid that a diffusers flow scheduler walks in `num_steps` steps; the scheduler itself is left as it was.

    Flow schedulers are `FlowMatchEulerDiscreteScheduler`, and multistep schedulers (UniPC, DPM-Solver) that were made
    with `use_flow_sigmas=True`. `shift` replaces the scheduler's own, be it fixed or resolution-dependent; the latter
    needs a `shift` or the `mu` that a family computes from the size of its videos, all of which walk one grid.
    `spacing` are the sigmas before the shift, where a pipeline passes some; else they are the scheduler's own.
    """
    name, config = type(scheduler).__name__, dict(getattr(scheduler, "config", {}))
    if config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction":
        shift_key = "flow_shift"
    elif "shift" in config:
        shift_key = "shift"
    else:
        raise UserError(
            f"{name} as configured is no flow scheduler: use FlowMatchEulerDiscreteScheduler, "
            "or UniPCMultistepScheduler with use_flow_sigmas=True and prediction_type='flow_prediction'"
        )
    if config.get("use_dynamic_shifting") and shift is None and mu is None:
        raise UserError(f"{name} shifts its sigmas by the resolution: set a fixed shift, for instance shift=3.0")
    _check_steps_and_shift(num_steps, shift)

    if shift is None:
        fresh = type(scheduler).from_config(scheduler.config)
        if hasattr(fresh, "set_shift"):  # what the caller set that way never reached the config
            fresh.set_shift(scheduler.shift)
    else:
        overrides = {"use_dynamic_shifting": False} if "use_dynamic_shifting" in config else {}
        fresh = type(scheduler).from_config(scheduler.config, **{shift_key: shift}, **overrides)
    steps = {"num_inference_steps": num_steps} if spacing is None else {"sigmas": spacing}
    shifts = {"mu": mu} if mu is not None and fresh.config.get("use_dynamic_shifting") else {}
    fresh.set_timesteps(**steps, **shifts)
    try:
        sigmas = fresh.sigmas.double()
        sigmas = sigmas.masked_fill((sigmas > 1) & (sigmas < 1 + ROUNDING), 1.0)
        return SigmaGrid(sigmas, fresh.timesteps)
    except ValueError as error:
        raise UserError(f"the grid of {name} in {num_steps} steps cannot be sampled: {error}") from error


def shifted_grid(num_steps: int, shift: float = 1.0) -> SigmaGrid:
    """Return a grid without a scheduler: `sigma = shift u / (1 + (shift - 1) u)` over `u = 1, 1 - 1/N, ..., 0`.

    A shift above 1 spends more of the steps at high noise; Wan uses 3 at 480p, 5 at 720p.
    """
    _check_steps_and_shift(num_steps, shift)
    sigmas = _shifted(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)
    return SigmaGrid(sigmas, (1000 * sigmas[:-1]).float())


def _shifted(u: Float64[Tensor, " points"], shift: float) -> Float64[Tensor, " points"]:
    return shift * u / (1 + (shift - 1) * u)


def _check_steps_and_shift(num_steps: int, shift: float | None) -> None:
    if num_steps < 1:
        raise UserError(f"a grid needs at least one denoising step, not {num_steps}")
    if shift is not None and not 0 < shift < float("inf"):
        raise UserError(f"the shift of a grid has to be above 0 and finite, not {shift}")
