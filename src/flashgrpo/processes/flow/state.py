"""What the flow process records of its stochastic steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from flashgrpo.types import Condition, Latents, index_rows


@dataclass(frozen=True)
class KeptGraph:
    """Velocities (B, C, F, H, W) of some units of one step, with the graph that leads to the weights."""

    units: Int64[Tensor, " batch"]
    v: Latents


@dataclass(frozen=True)
class FlowState:
    """The stochastic steps x_k -> x_{k+1} of U units: all that their replay needs.

    `condition` has a row for each of this rank's samples, not for each unit. `old_v` is the velocity by the weights
    that drew, where the ratio needs it for several optimizer steps. `kept` are graphs of units among these.
    """

    sample: Int64[Tensor, " units"]
    k: Int64[Tensor, " units"]
    x: Float32[Tensor, "units channels frames height width"]
    x_next: Float32[Tensor, "units channels frames height width"]
    log_prob: Float32[Tensor, " units"]
    condition: Condition
    old_v: Float32[Tensor, "units channels frames height width"] | None = None
    kept: Sequence[KeptGraph] = ()

    def __len__(self) -> int:
        return len(self.k)

    def __getitem__(self, units: Int64[Tensor, " some"]) -> "FlowState":
        """The same of some units."""
        place = torch.full((len(self.k),), -1)
        place[units] = torch.arange(len(units))
        kept = [KeptGraph(place[one.units], one.v) for one in self.kept if bool((place[one.units] >= 0).all())]
        return FlowState(
            self.sample[units],
            self.k[units],
            index_rows(self.x, units),
            index_rows(self.x_next, units),
            index_rows(self.log_prob, units),
            self.condition,
            None if self.old_v is None else index_rows(self.old_v, units),
            kept,
        )

    @property
    def conditions(self) -> Condition:
        """The condition of each unit."""
        return self.condition[self.sample]

    @property
    def graph(self) -> Latents | None:
        """The kept velocities of these units, where one graph is of all of them."""
        whole = [one.v for one in self.kept if torch.equal(one.units, torch.arange(len(self)))]
        return whole[0] if whole else None
