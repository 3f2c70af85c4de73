"""A process without a model: the score of a term is the product of its features and a weight, both (D,).

So gradients are arithmetic: that of a score by the weight is the term's features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flashgrpo.distributed.world import World
from flashgrpo.process import Process, Record

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Features:
    """What the replay of some units needs: a row (D,) for each of their terms.

    Args:
        number: of each unit in the whole record.
        of_unit: the rows of every unit of the whole record.
    """

    number: Tensor
    of_unit: Sequence[Tensor]

    def __getitem__(self, units: Tensor) -> "Features":
        return Features(self.number[units], self.of_unit)

    @property
    def rows(self) -> Tensor:
        """The features of all terms of these units, (T, D)."""
        return torch.cat([torch.empty(0, 3), *(self.of_unit[number] for number in self.number.tolist())])


class Toy(Process):
    """Replays `micro_batch` units at once. Column "kl" is half the squared distance from the weight 0, for each term.

    Attributes:
        replayed: the units of each call of `replay`, by their numbers in the whole record.
        idled: the slots of calls on nothing.
    """

    views = ("whole",)
    channels = ("good", "short")
    device = CPU
    micro_batch = 2
    network = nn.Linear(1, 1)
    identity = "toy"
    takes_image = False
    addends = 1

    def __init__(self, micro_batch: int = 2, slots_of_stage: int = 100) -> None:
        self.micro_batch = micro_batch
        self.network = nn.Linear(3, 1, bias=False)
        self.network.weight.data = torch.tensor([[0.5, -0.25, 1.0]])
        self._slots_of_stage, self._stages = slots_of_stage, [nn.Identity() for _ in range(10)]
        self.replayed: list[list[int]] = []
        self.idled: list[int] = []

    @property
    def weight(self) -> Tensor:
        return self.network.weight

    def micro_batches(self, record: Record) -> list[Record]:
        every = torch.arange(len(record))
        return [record[units] for units in every.split(self.micro_batch)] if len(record) else []

    def replay(self, record: Record, columns: Sequence[str]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        self.replayed.append(record.state.number.tolist())
        score = (record.state.rows * self.weight[0]).sum(-1)
        distance = (self.weight.square().sum() / 2).expand(len(score))
        return [(score, {"kl": distance} if "kl" in columns else {})]

    def stage(self, slot: int) -> nn.Module:
        return self._stages[slot // self._slots_of_stage]

    def idle(self, slot: int, columns: Sequence[str]) -> list[Tensor]:
        self.idled.append(slot)
        return [self.weight.sum()]


def toy_record(process: Toy, slots: Sequence[int], terms: Sequence[int], advantages: bool = True) -> Record:
    """A record of units with this number of terms each, drawn with the process's weight: a replay has ratio 1.

    Each unit is a sample of its own, and all samples have one key.
    """
    source = torch.Generator().manual_seed(0)
    state = Features(torch.arange(len(slots)), [torch.randn(count, 3, generator=source) for count in terms])
    unit = torch.arange(len(slots)).repeat_interleave(torch.tensor(terms, dtype=torch.int64))
    count, nothing = len(unit), torch.zeros_like(unit)
    weight, advantage = 0.5 + torch.rand(count, generator=source), torch.randn(count, generator=source)
    old = (state.rows * process.weight[0]).sum(-1).detach()
    slot = torch.tensor(slots, dtype=torch.int64)
    return Record(slot, unit, unit, nothing, nothing, weight, old, state, advantage if advantages else None)


@dataclass(frozen=True)
class FirstOfTwo(World):
    """Rank 0 of two, which is told one by one what rank 1 has to say."""

    device: torch.device = CPU
    size: int = 2
    said: list = field(default_factory=list)

    def gather(self, value):
        return [value, self.said.pop(0)]


@dataclass(frozen=True)
class SecondOfTwo(FirstOfTwo):
    """The same of rank 1, which is told what rank 0 has to say."""

    rank: int = 1

    def gather(self, value):
        return [self.said.pop(0), value]
