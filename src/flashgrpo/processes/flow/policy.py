"""The policy in the sense of reinforcement learning: what a denoising step draws, given the network.

    pi(x_{k+1} | x_k, condition) = N( mean(k, x_k, v), std_k^2 I ),   v = velocity of the network with guidance

Rollout draws from it and update replays it, both through this one class, so that the first ratio is 1 bit for bit.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from flashgrpo.errors import UserError
from flashgrpo.processes.flow.model import GridPoint, VideoModel
from flashgrpo.processes.flow.schedule import SigmaGrid
from flashgrpo.processes.flow.table import StepTable
from flashgrpo.types import Condition, Latents, index_rows

Steps = Int64[Tensor, " batch"]
LogProb = Float32[Tensor, " batch"]
Around = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Policy:
    """A video model on a grid, with the noise of its stochastic steps.

    Args:
        table: mean, std and density of every step of `grid`.
        guidance: scale of classifier-free guidance at each step, (N,), the same in rollout and in update.
        micro_batch: rows in one exact forward.
    """

    model: VideoModel
    grid: SigmaGrid
    table: StepTable
    guidance: Float32[Tensor, " steps"]
    micro_batch: int

    def velocity(self, k: Steps, x: Latents, condition: Condition) -> Latents:
        """The network's velocity at step k of each row, (B, C, F, H, W)."""
        return self.model.velocity(x, self._moment(k), condition)

    def idle(self, step: int) -> Tensor:
        """Take part in the collectives of a network call at a step, without a sample; differentiable."""
        return self.model.idle(self._moment(torch.tensor([step])))

    def _moment(self, k: Steps) -> GridPoint:
        return GridPoint(self.grid.timesteps[k], self.grid.sigmas[k], self.guidance[k])

    def exact_velocity(self, k: Steps, x: Latents, condition: Condition) -> Latents:
        """The velocity of a stochastic step: bit for bit the same for a sample, whatever else is computed with it."""
        return torch.cat(self.exact_parts(k, x, condition))

    def exact_parts(self, k: Steps, x: Latents, condition: Condition, around: Around = nullcontext) -> list[Tensor]:
        """The same, as the network computes it: `micro_batch` rows at a time, with a context `around` each call.

        Kernels round differently for different batch sizes. So this always runs the network on `micro_batch` rows, and
        fills the last batch up with copies of its last row. The deterministic steps need no such care, since they are
        environment: no gradient passes through them.
        """
        parts = []
        for first in range(0, len(x), self.micro_batch):
            count = min(self.micro_batch, len(x) - first)
            rows = first + torch.arange(self.micro_batch).clamp(max=count - 1)
            with around():
                parts.append(self.velocity(k[rows], index_rows(x, rows), condition[rows])[:count])
        return parts

    def calls(self, rows: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
        """How many times `exact_velocity` of so many rows runs the network."""
        return -(-rows // self.micro_batch)

    def act(self, k: Steps, x: Latents, v: Latents, noise: Latents) -> tuple[Latents, LogProb]:
        """Take the stochastic step k with its exact velocity and standard normal `noise`: x_{k+1}, log-density."""
        x_next = self.table.sample(k, x, v, noise)
        return x_next, self.table.log_prob(k, x_next, x, v)


def guidance_by_step(
    model: VideoModel, grid: SigmaGrid, scale: float, scale_2: float | None = None
) -> Float32[Tensor, " steps"]:
    """The guidance scale of every step: `scale`, and `scale_2` where it is given and the second expert computes.

    Raises:
        UserError: `scale_2` for a model that has one expert only.
    """
    experts = [model.expert(float(timestep)) for timestep in grid.timesteps]
    first = model.expert(float(grid.timesteps.max()))
    if scale_2 is not None and first is model.network:
        raise UserError("guidance_scale_2: this model has one expert only; leave it out")
    second = scale if scale_2 is None else scale_2
    return torch.tensor([scale if expert is first else second for expert in experts])
