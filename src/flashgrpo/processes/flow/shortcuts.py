"""The deterministic steps of a rollout, which are no actions and may be made cheap.

One step of a walk is the policy's action and is computed exactly. The other steps have no gradient and no density in
the loss: they only lead to the video that is scored. So they may be made cheaper without touching the gradient of the
action: by a multistep solver that takes fewer steps, by guidance within an interval of noise levels only, by lower
precisions, by features of the step before. What each does to the videos is measured by `benchmarks/fidelity.py`.
"""

import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from flashgrpo.errors import UserError
from flashgrpo.processes.flow.network import GuidedNetwork
from flashgrpo.processes.flow.reuse import Reuse
from flashgrpo.processes.flow.solvers import Euler, Solver, Walk
from flashgrpo.processes.flow.steps import StepMask
from flashgrpo.types import Condition, Latents

warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # norms in float32 under autocast


@dataclass(frozen=True)
class DeterministicSteps:
    """How a sample moves along the grid where its steps are not stochastic.

    Args:
        solver: it begins anew after a stochastic step.
        steps: points of the grid at which a walk without stochastic steps stops, evenly spread; None is all N.
        reuse: of what the network has computed at the step before; None computes everything.
    """

    network: GuidedNetwork
    solver: Solver = field(default_factory=Euler)
    steps: int | None = None
    reuse: Reuse | None = None

    def walk(self, points: Sequence[int]) -> Walk:
        """Return a walk that stops at these points of the grid, rising, and ends where the grid ends."""
        return self.solver.walk(self.network.grid, points)

    def features(self) -> "Features":
        """Return what the network computes on walks, where steps may use it again."""
        return Features(self.network.model.network, self.reuse)

    def velocity(self, k: int, x: Latents, condition: Condition) -> Latents:
        """Return the network's velocity at step k, (B, C, F, H, W), as cheap as the settings make it."""
        return self.network.velocity(k, x, condition)


class Features:
    """What the networks have computed on one walk of some rows; nothing is kept without a `reuse`.

    Raises:
        UserError: a network is none of diffusers' own.
    """

    def __init__(self, network: nn.Module, reuse: Reuse | None) -> None:
        networks = list(network.values()) if isinstance(network, nn.ModuleDict) else [network]
        self._networks: list[Any] = networks if reuse else []
        self._reuse = reuse
        self._walk: Hashable = None
        if not all(hasattr(one, "enable_cache") for one in self._networks):
            raise UserError("rollout.reuse: this model's network has no hooks for it; leave it out")

    @contextmanager
    def of(self, walk: Hashable) -> Iterator[None]:
        """Inside of it the networks may take over what the last call computed, if that was of the same walk."""
        if not self._reuse:
            yield
            return
        if walk != self._walk:
            self.forget()
            for network in self._networks:
                network.enable_cache(self._reuse.config())
            self._walk = walk
        with ExitStack() as stack:
            for network in self._networks:
                stack.enter_context(network.cache_context("walk"))
            yield

    def forget(self) -> None:
        """From here on, and until the next call of `of`, the networks compute everything."""
        for network in self._networks:
            if network.is_cache_enabled:
                network.disable_cache()
        self._walk = None


def visited(stochastic: StepMask, steps: int | None) -> StepMask:
    """The points at which a sample stops: `steps` of the grid's N, evenly, and both ends of each stochastic step.

    A stochastic step always is one of the training grid's, however few points there are beside it. With N = 10, 4 steps
    and step 3 stochastic the points are 0, 2, 3, 4, 5, 7: five deterministic steps, the third from 4 to 5.

    Args:
        stochastic: (B, N).

    Returns:
        (B, N); from each point a sample moves to its next one, and from the last to the end of the grid.
    """
    num_steps = stochastic.shape[1]
    visits = stochastic.clone()
    visits[:, 1:] |= stochastic[:, :-1]
    count = num_steps if steps is None else min(steps, num_steps)
    visits[:, torch.arange(count) * num_steps // count] = True
    return visits


def leaders(keys: Sequence[Hashable]) -> tuple[Int64[Tensor, " leaders"], Int64[Tensor, " batch"]]:
    """Return the first row of each key, and for each row the place of its key among them.

    Rows whose initial noise is the same move as one until their first stochastic step: the first computes for all.
    Example: keys a b a c give [0, 1, 3] and [0, 1, 0, 2].
    """
    places: dict[Hashable, int] = {}
    of = torch.tensor([places.setdefault(key, len(places)) for key in keys], dtype=torch.int64)
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    return torch.tensor([first[key] for key in places], dtype=torch.int64), of
