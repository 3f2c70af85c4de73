"""The deterministic steps of a rollout: the environment, in the sense of reinforcement learning.

One step of a walk is the policy's action and is computed exactly (`policy.py`). The other steps have no gradient and no
density in the loss: they only lead to the video that is scored. So they may be made cheaper without touching the
gradient of the action: by a multistep solver that takes fewer steps, by guidance within an interval of noise levels
only, and by lower precisions. What each does to the videos is measured by `benchmarks/fidelity.py`.
"""

import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor, nn

from flashgrpo.errors import UserError
from flashgrpo.processes.flow.float8 import Float8
from flashgrpo.processes.flow.model import GridPoint, VideoModel
from flashgrpo.processes.flow.reuse import Reuse
from flashgrpo.processes.flow.schedule import SigmaGrid
from flashgrpo.processes.flow.solvers import Euler, Solver, Walk
from flashgrpo.processes.flow.steps import StepMask
from flashgrpo.types import Condition, Latents

warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # norms in float32 under autocast


class Features:
    """What the networks have computed on one walk of some rows; nothing is kept without a `reuse`.

    Raises:
        UserError: a network is none of diffusers' own.
    """

    def __init__(self, network: nn.Module, reuse: Reuse | None) -> None:
        networks = list(network.values()) if isinstance(network, nn.ModuleDict) else [network]
        self._networks: list[Any] = networks if reuse else []
        self._reuse = reuse
        self._rows: Hashable = None
        if not all(hasattr(one, "enable_cache") for one in self._networks):
            raise UserError("rollout.reuse: this model's network has no hooks for it; leave it out")

    @contextmanager
    def of(self, rows: Hashable) -> Iterator[None]:
        """Inside of it the networks may take over what the last call computed, if that was of the same rows."""
        if not self._reuse:
            yield
            return
        if rows != self._rows:
            self.forget()
            for network in self._networks:
                network.enable_cache(self._reuse.config())
            self._rows = rows
        with ExitStack() as stack:
            for network in self._networks:
                stack.enter_context(network.cache_context("walk"))
            yield

    def forget(self) -> None:
        """From here on, and until the next call of `of`, the networks compute everything."""
        for network in self._networks:
            if network.is_cache_enabled:
                network.disable_cache()
        self._rows = None


@dataclass(frozen=True)
class Environment:
    """How a sample moves along the grid where its steps are not stochastic.

    Args:
        guidance: scale of classifier-free guidance at each step, (N,).
        solver: of the deterministic steps; it begins anew after a stochastic step.
        steps: points of the grid at which a walk without stochastic steps stops, evenly spread; None is all N.
        dtype: in which the network computes (autocast); None leaves it as it is.
        float8: computes its frozen layers; None leaves them as they are.
        reuse: of what the network has computed at the last step; None computes everything.
    """

    model: VideoModel
    grid: SigmaGrid
    guidance: Float32[Tensor, " steps"]
    solver: Solver = field(default_factory=Euler)
    steps: int | None = None
    dtype: torch.dtype | None = None
    float8: Float8 | None = None
    reuse: Reuse | None = None

    def visits(self, stochastic: StepMask) -> StepMask:
        """At which points of the grid each row calls the network, (B, N); see `visited`."""
        return visited(stochastic, self.steps)

    def walk(self, points: Sequence[int]) -> Walk:
        """A walk that stops at these points of the grid, rising, and ends where the grid ends."""
        return self.solver.walk(self.grid, points)

    def features(self) -> Features:
        """What the network computes on a walk, where steps may use it again."""
        return Features(self.model.network, self.reuse)

    def velocity(self, k: Int64[Tensor, " batch"], x: Latents, condition: Condition) -> Latents:
        """The network's velocity at step k of each row, (B, C, F, H, W), as cheap as the settings make it."""
        with self._precision():
            return self.model.velocity(x, self._moment(k), condition)

    def idle(self, step: int) -> None:
        """Take part in the collectives of a network call at a step, without a sample."""
        with self._precision():
            self.model.idle(self._moment(torch.tensor([step])))

    def _moment(self, k: Int64[Tensor, " batch"]) -> GridPoint:
        return GridPoint(self.grid.timesteps[k], self.grid.sigmas[k], self.guidance[k])

    @contextmanager
    def _precision(self) -> Iterator[None]:
        lower = torch.autocast(self.model.device.type, self.dtype) if self.dtype else nullcontext()
        compiled = torch.compiler.set_stance("default")  # elsewhere blocks are never compiled, see `prepare_network`
        with lower, compiled, self.float8() if self.float8 else nullcontext():
            yield


def visited(stochastic: StepMask, steps: int | None) -> StepMask:
    """The points at which a sample stops: `steps` of the grid's N, evenly, and both ends of each stochastic step.

    A stochastic step always is one of the training grid's, however few points there are beside it. With N = 10, 4 steps
    and step 3 stochastic the points are 0, 2, 3, 4, 5, 7: five deterministic steps, the third from 4 to 5.

    Args:
        stochastic: (B, N).

    Returns:
        (B, N); from each point a sample goes on to its next one, and from the last to the end of the grid.
    """
    num_steps = stochastic.shape[1]
    visits = stochastic.clone()
    visits[:, 1:] |= stochastic[:, :-1]
    count = num_steps if steps is None else min(steps, num_steps)
    visits[:, torch.arange(count) * num_steps // count] = True
    return visits


def within(
    guidance: Float32[Tensor, " steps"], grid: SigmaGrid, interval: tuple[float, float]
) -> Float32[Tensor, " steps"]:
    """The guidance scales where sigma lies in [low, high], and 1, which is none, elsewhere (arXiv 2404.07724)."""
    low, high = interval
    inside: Bool[Tensor, " steps"] = (grid.sigmas[:-1] >= low) & (grid.sigmas[:-1] <= high)
    return torch.where(inside, guidance, torch.ones_like(guidance))


def leaders(groups: Sequence[tuple[int, int]], stochastic: StepMask) -> Int64[Tensor, " batch"]:
    """Of each row the first that has the same key and the same stochastic steps, (B,).

    Rows whose initial noise is the same move as one until their first stochastic step: the first computes for all.
    """
    first: dict[tuple[object, ...], int] = {}
    keys = zip(groups, map(tuple, stochastic.tolist()), strict=True)
    return torch.tensor([first.setdefault(key, row) for row, key in enumerate(keys)], dtype=torch.int64)
