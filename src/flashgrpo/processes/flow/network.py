"""The network on a sigma grid: which guidance each step has, and the velocity of a step."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from flashgrpo.errors import UserError
from flashgrpo.processes.flow.choices import branches_of
from flashgrpo.processes.flow.float8 import Float8
from flashgrpo.processes.flow.model import GridPoint, VideoModel
from flashgrpo.processes.flow.schedule import SigmaGrid
from flashgrpo.types import Condition, Latents


@dataclass(frozen=True)
class GuidedNetwork:
    """A video model on a grid, with the scale of classifier-free guidance of each step.

    Args:
        guidance: (N,).
        dtype: in which the network computes (autocast); None leaves it as it is, and compiled blocks uncompiled.
        float8: computes its frozen layers; None leaves them as they are.
        compiled: whether compiled blocks serve as such; with gradients they would round differently.
    """

    model: VideoModel
    grid: SigmaGrid
    guidance: Float32[Tensor, " steps"]
    dtype: torch.dtype | None = None
    float8: Float8 | None = None
    compiled: bool = False

    def velocity(self, k: int, x: Latents, condition: Condition) -> Latents:
        """Return the velocity at step k, (B, C, F, H, W)."""
        with self._precision():
            return self.model.velocity(x, self._points(k, len(x)), condition)

    def idle(self, k: int) -> Tensor:
        """Take part in the collectives of a network call at a step, without a sample; differentiable."""
        with self._precision():
            return self.model.idle(self._points(k, 1))

    def guided(self, k: int) -> bool:
        """Return whether step k runs two branches."""
        return branches_of(self.model.guidance) == 2 and bool(self.guidance[k] > 1)

    def _points(self, k: int, rows: int) -> GridPoint:
        steps = torch.full((rows,), k)
        return GridPoint(self.grid.timesteps[steps], self.grid.sigmas[steps], self.guidance[steps])

    @contextmanager
    def _precision(self) -> Iterator[None]:
        lower = torch.autocast(self.model.device.type, self.dtype) if self.dtype else nullcontext()
        compiled = torch.compiler.set_stance("default") if self.compiled else nullcontext()  # see `prepare_network`
        with lower, compiled, self.float8() if self.float8 else nullcontext():
            yield


@dataclass(frozen=True)
class Guidance:
    """The guidance scale of each step of a grid, (N,): where the step is stochastic, and where it is deterministic."""

    stochastic: Float32[Tensor, " steps"]
    deterministic: Float32[Tensor, " steps"]


def guidance_of(
    model: VideoModel,
    grid: SigmaGrid,
    scale: float,
    scale_2: float | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Guidance:
    """The scale is `scale`, and `scale_2` where it is given and the second expert computes.

    Deterministic steps have it where sigma lies in the interval [low, high], and 1, which is none, elsewhere (arXiv
    2404.07724).

    Raises:
        UserError: `scale_2` for a model that has one expert only, or a scale or an interval that has no effect.
    """
    if model.guidance == "none" and scale > 1:
        raise UserError(f"guidance_scale: this model was distilled to sample without guidance; take 1, not {scale:g}")
    if model.guidance != "classifier-free" and tuple(interval) != (0, 1):
        raise UserError("guidance_interval: this model has one branch only, which no step can leave out; leave it out")
    experts = [model.expert(float(timestep)) for timestep in grid.timesteps]
    first = model.expert(float(grid.timesteps.max()))
    if scale_2 is not None and first is model.network:
        raise UserError("guidance_scale_2: this model has one expert only; leave it out")
    second = scale if scale_2 is None else scale_2
    scales = torch.tensor([scale if expert is first else second for expert in experts])
    inside: Bool[Tensor, " steps"] = (grid.sigmas[:-1] >= interval[0]) & (grid.sigmas[:-1] <= interval[1])
    return Guidance(scales, torch.where(inside, scales, torch.ones_like(scales)))
