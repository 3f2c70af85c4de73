"""What the flow process scores of the samples that it draws, and scores again in an update.

`recorded.py` scores the stochastic steps of a rollout, `renoised.py` finished samples that are noised again. The
process draws, evaluates and decodes alike for both.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from flashgrpo.distributed.world import World
from flashgrpo.process import Columns, Record
from flashgrpo.processes.calls import by_other_weights
from flashgrpo.processes.flow.model import VideoModel
from flashgrpo.processes.flow.rollout import Act, MicroBatch
from flashgrpo.types import Condition, Latents, Sample

Names = Sequence[tuple[int, int, int, int]]
"""(seed, update, group, member) of each sample."""
Score = tuple[Float32[Tensor, " terms"], Columns]


@runtime_checkable
class Drawing(Protocol):
    """The samples of an update while they are drawn."""

    def act(self, batch: MicroBatch) -> Act | None:
        """Return what makes the stochastic steps of a micro-batch; None where there are none."""
        ...

    def record(self, latents: Latents) -> Record:
        """Return what the update is to replay of them, once all are drawn; ranks call this together."""
        ...


class Source(ABC):
    """Where the scores of an update come from.

    Attributes:
        average: a context in which the network has the averaged weights of the behaviour.
        keeps_graphs: whether the last rollout has left its graphs to the update.
    """

    keeps_graphs = False

    def __init__(self, model: VideoModel, micro_batch: int, world: World) -> None:
        self.model, self.micro_batch, self.world = model, micro_batch, world
        self.average: Callable[[], AbstractContextManager[None]] = nullcontext

    @abstractmethod
    def plan(self, samples: Sequence[Sample], seed: int) -> list[MicroBatch]:
        """Return the micro-batches of a rollout."""

    @abstractmethod
    def begin(
        self, samples: Sequence[Sample], condition: Condition, seed: int, uses: int, columns: Sequence[str]
    ) -> Drawing:
        """A rollout begins; see `Process.draw`."""

    @abstractmethod
    def micro_batches(self, record: Record) -> Sequence[Record]:
        """See `Process`."""

    @abstractmethod
    def replay(self, record: Record, columns: Sequence[str]) -> Score:
        """Return the score of each unit of a micro-batch, and the columns asked for; differentiable."""

    @abstractmethod
    def unfilled(self, record: Record) -> Float32[Tensor, " terms"]:
        """Return the scores by one call of exactly these units, of one slot: what rounds otherwise in another batch."""

    @abstractmethod
    def stage(self, slot: int) -> nn.Module:
        """Return the expert that computes a slot."""

    @abstractmethod
    def call_on_nothing(self, slot: int) -> Tensor:
        """Make the network call of a replay on nothing; differentiable."""

    def idle(self, slot: int, columns: Sequence[str]) -> Tensor:
        """Take part in the collectives of a replay, without a gradient of one's own."""
        v = self.call_on_nothing(slot)
        self.by_other_weights(columns, lambda: self.call_on_nothing(slot))
        return v

    def by_other_weights(self, columns: Sequence[str], velocity: Callable[[], Tensor]) -> Mapping[str, Tensor]:
        """The velocities that columns compare with: "kl" of the base model, "kl_average" of the averaged weights."""
        return by_other_weights(columns, {"kl": self.model.reference, "kl_average": self.average}, velocity)


def group_of(samples: Sequence[Sample]) -> Int64[Tensor, " samples"]:
    """Return the number of each sample's prompt group, by which it is compared."""
    return torch.tensor([sample.group.group for sample in samples], dtype=torch.int64)


def names_of(samples: Sequence[Sample], seed: int) -> Names:
    """Return what names the noise of each sample."""
    return [(seed, *sample.name) for sample in samples]
