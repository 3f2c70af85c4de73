"""Samples drawn, scored and compared: one rollout batch, as far as the update needs it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from flashgrpo.distributed.world import World
from flashgrpo.learning.advantage import advantages_by_key
from flashgrpo.learning.settings import Credit
from flashgrpo.process import Outputs, Process, Record
from flashgrpo.types import PromptGroup, RewardTable, to_device

Phases = Callable[[str], AbstractContextManager[None]]
"""A clock: `with clock("rollout"): ...`"""


@runtime_checkable
class Scores(Protocol):
    """Scores the samples of an update while later ones are drawn."""

    def add(self, rows: Tensor, outputs: Outputs) -> None:
        """This rank has drawn some rows of its share."""
        ...

    def table(self) -> RewardTable:
        """Return the rewards of all ranks' samples, in their order."""
        ...


@dataclass(frozen=True)
class Drawn:
    """One rollout batch of B samples in all, of which this rank has drawn those from number `first` on.

    `outputs` and `record` are this rank's, `rewards` are of all samples. What rewards look at is large and is not kept:
    it is gone when every reward has seen it. `anchor` is the number of each sample's anchor among them, None where
    groups have none.
    """

    update: int
    first: int
    outputs: Outputs
    record: Record
    rewards: RewardTable
    anchor: Int64[Tensor, " samples"] | None = None

    @property
    def members(self) -> RewardTable:
        """The rewards of the samples that were drawn to be learnt from."""
        return self.rewards if self.anchor is None else self.rewards[~self._is_anchor]

    @property
    def anchors(self) -> RewardTable | None:
        """The rewards of the groups' anchors; None where they have none."""
        return None if self.anchor is None else self.rewards[self._is_anchor]

    @property
    def _is_anchor(self) -> Bool[Tensor, " samples"]:
        assert self.anchor is not None
        return self.anchor == torch.arange(len(self.anchor))


@dataclass(frozen=True)
class Compared:
    """The advantage of each sample under each key and channel that it has terms of, on all ranks; (pairs,) each.

    `dropped` are those of groups in which a reward is not finite. `record` is this rank's, with the advantages of its
    terms.
    """

    key: Int64[Tensor, " pairs"]
    channel: Int64[Tensor, " pairs"]
    sample: Int64[Tensor, " pairs"]
    advantage: Float32[Tensor, " pairs"]
    dropped: Bool[Tensor, " pairs"]
    record: Record

    @property
    def groups(self) -> int:
        """Keys of all channels."""
        return self._count(torch.ones_like(self.dropped))

    @property
    def dropped_groups(self) -> int:
        """Keys of a channel in which a reward is not finite."""
        return self._count(self.dropped)

    @property
    def flat_groups(self) -> int:
        """Keys of a channel in which all advantages are 0, so that nothing is learnt from them, and none is dropped."""
        return self.groups - self._count((self.advantage != 0) | self.dropped)

    def _count(self, pairs: Bool[Tensor, " pairs"]) -> int:
        """Count the keys of a channel that have some of these pairs."""
        return torch.stack([self.key, self.channel])[:, pairs].unique(dim=1).shape[1]


def draw_and_score(
    process: Process,
    scores: Scores,
    groups: Sequence[PromptGroup],
    seed: int,
    world: World,
    clock: Phases,
    uses: int,
    columns: Sequence[str] = (),
) -> Drawn:
    """Draw this rank's share of the groups' samples, and score them meanwhile."""
    samples = [sample for group in groups for sample in group.samples]
    mine = world.slice(len(samples))
    with clock("rollout"):
        outputs, record = process.draw(samples[mine], seed, scores.add, uses, columns)
    return Drawn(groups[0].update, mine.start, outputs, record, scores.table(), _anchors(groups))


def _anchors(groups: Sequence[PromptGroup]) -> Int64[Tensor, " samples"] | None:
    """Return the number of each sample's anchor, the last sample of its group; None where groups have none."""
    if not groups[0].anchored:
        return None
    sizes = torch.tensor([len(group.samples) for group in groups])
    return (sizes.cumsum(0) - 1).repeat_interleave(sizes)


def compare(drawn: Drawn, channels: Sequence[str], credit: Credit, world: World) -> Compared:
    """Return the advantages of all samples, and this rank's record with those of its terms."""
    record = drawn.record
    own, of_term = torch.stack([record.key, record.channel, record.sample + drawn.first]).unique(
        dim=1, return_inverse=True
    )
    everyone: list[Any] = world.gather(own.tolist())
    pairs = torch.cat([torch.tensor(of_rank, dtype=torch.int64).view(3, -1) for of_rank in everyone], dim=1)
    key, channel, sample = pairs
    anchor = None if drawn.anchor is None else drawn.anchor[sample]
    assert anchor is None or not bool((sample == anchor).any()), "an anchor is held against, and is no term"
    advantage, dropped = advantages_by_key(drawn.rewards, channels, credit, key, channel, sample, anchor)
    before = sum(len(of_rank[0]) for of_rank in everyone[: world.data_rank])
    mine = to_device(advantage[before : before + own.shape[1]][of_term], record.weight.device)
    return Compared(key, channel, sample, advantage, dropped, replace(record, advantage=mine))
