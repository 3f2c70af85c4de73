"""Who replays what in an update: the units of all ranks, cut into optimizer steps, rounds and micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from flashgrpo.distributed.world import World
from flashgrpo.learning.settings import OptimConfig
from flashgrpo.process import Process, Record


@dataclass(frozen=True)
class Work:
    """The units of an optimizer step, on all ranks; (U,) each, ranks one after the other.

    Args:
        slot: of each unit.
        owner: the rank that has the unit.
        term_counts: how many terms the unit has.
        number: of each unit in its rank's record.
        key: that the unit's terms are compared by; the smallest where they have several.
    """

    process: Process
    rank: int
    slot: Int64[Tensor, " units"]
    owner: Int64[Tensor, " units"]
    term_counts: Int64[Tensor, " units"]
    number: Int64[Tensor, " units"]
    key: Int64[Tensor, " units"]

    @classmethod
    def of(cls, process: Process, record: Record, world: World) -> "Work":
        """Tell all ranks what each has to do."""
        counts = record.unit.bincount(minlength=len(record))
        keys = torch.full_like(counts, torch.iinfo(torch.int64).max).scatter_reduce(0, record.unit, record.key, "amin")
        everyone = world.gather([record.slot.tolist(), counts.tolist(), keys.tolist()])
        slots, terms, keys = (
            torch.tensor([n for rank in everyone for n in rank[i]], dtype=torch.int64) for i in range(3)
        )
        lengths = torch.tensor([len(rank[0]) for rank in everyone])
        owner = torch.arange(len(everyone)).repeat_interleave(lengths)
        number = torch.cat([torch.arange(length) for length in lengths.tolist()])
        return cls(process, world.data_rank, slots, owner, terms, number, keys)

    def optimizer_steps(self, config: OptimConfig, whole_keys: bool = False) -> Iterator["Work"]:
        """Cut the work into n optimizer steps; each takes every n-th key, with all units that are compared by it.

        Two steps of 48 groups of 8 samples are 24 groups of 8 each, of which every rank has some. Where there are fewer
        keys than steps, a step takes some units of each; with `whole_keys`, there are as many steps as keys.
        """
        keys, place = self.key.unique(return_inverse=True)
        steps = min(config.minibatches, len(keys)) if whole_keys else config.minibatches
        dealt = place if len(keys) >= steps else torch.arange(len(place))
        for _ in range(config.passes):
            for step in range(steps):
                yield self._part(dealt % steps == step)

    def _part(self, chosen: Bool[Tensor, " units"]) -> "Work":
        columns = (self.slot, self.owner, self.term_counts, self.number, self.key)
        return Work(self.process, self.rank, *(column[chosen] for column in columns))

    @property
    def terms(self) -> int:
        """Terms of all ranks."""
        return int(self.term_counts.sum())

    def terms_of(self, slot: int) -> int:
        """Terms of a slot, on all ranks."""
        return int(self.term_counts[self.slot == slot].sum())

    @property
    def units_by_slot(self) -> dict[str, int]:
        """Slot -> units, on all ranks."""
        return {str(slot): count for slot, count in enumerate(self.slot.bincount().tolist()) if count}

    def micro_batches(self, record: Record, slots: Sequence[int]) -> Iterator[Record]:
        """Yield what this rank replays of some slots, in turn."""
        for slot in slots:
            own = self.number[(self.slot == slot) & (self.owner == self.rank)]
            yield from self.process.micro_batches(record[own])

    def rounds(self, by_slot: bool) -> Iterator[tuple[Sequence[int], int]]:
        """Cut the work where all ranks have to meet: yields slots, and how many calls this rank makes on nothing.

        Ranks that hold a network between them call it together, so each makes as many calls as the one with most work.
        They meet once for each stage of the network, or `by_slot`, so that each slot's gradient is summed by itself.

        Example of one stage, for rank 0: slots 2 0 0 2 0 of rank 0 and 1 of rank 1 in micro-batches of 2 are 3 calls
        and 1 call: one round of slots 0, 1 and 2, in which rank 1 makes 2 calls on nothing.
        """
        slots = sorted(set(self.slot.tolist()))
        stages: dict[Any, list[int]] = {}
        for slot in slots:
            stages.setdefault(slot if by_slot else self.process.stage(slot), []).append(slot)
        for members in stages.values():
            calls = torch.zeros(int(self.owner.max()) + 1, dtype=torch.int64)
            for slot in members:
                units = self.owner[self.slot == slot].bincount(minlength=len(calls))
                calls += -(-units // self.process.micro_batch)
            own = int(calls[self.rank]) if self.rank < len(calls) else 0
            yield members, int(calls.max()) - own
