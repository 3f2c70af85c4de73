"""What the streaming process scores of the videos that it draws, and scores again in an update."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from flashgrpo.process import Columns, Record
from flashgrpo.processes.streaming.cache import KVCache
from flashgrpo.processes.streaming.drawing import BlockName, Script, Stream
from flashgrpo.processes.streaming.model import StreamingModel
from flashgrpo.types import Condition, Latents, Sample, index_rows

Addend = tuple[Float32[Tensor, " terms"], Columns]


@dataclass(frozen=True)
class Fork:
    """Where the branches of a prompt group part, with what a replay needs of the video before.

    Args:
        group: (seed, update, group), which names the noise that its branches share.
        frame: first frame of the block.
        level: number of the level at which they part, where it is not the whole block.
        cache: of the frames that the block attends to, un-routed.
        condition: of the block, one row.
    """

    group: tuple[int, int, int]
    frame: int
    level: int
    cache: KVCache
    condition: Condition

    @property
    def shared(self) -> BlockName:
        """The names of the noise that all branches of the group share."""
        return shared_name(*self.group)


@dataclass(frozen=True)
class StreamState:
    """What the replay of U units needs: the fork of each, and tensors with a row for each; caches are of all units."""

    fork: Int64[Tensor, " units"]
    forks: Sequence[Fork]
    recorded: Float[Tensor, "units ..."]

    def __getitem__(self, units: Int64[Tensor, " some"]) -> "StreamState":
        """Return the state of some units."""
        return StreamState(self.fork[units], self.forks, index_rows(self.recorded, units))

    @property
    def of_units(self) -> list[Fork]:
        """The fork of each unit."""
        return [self.forks[number] for number in self.fork.tolist()]


def shared_name(seed: int, update: int, group: int) -> BlockName:
    """Return the names of the noise that the videos of a group share."""
    return lambda frame, level: (seed, "stream", update, group, frame, level)


def own_name(seed: int, sample: Sample) -> BlockName:
    """Return the names of the noise that is a sample's own."""
    return lambda frame, level: (seed, "branch", *sample.name, frame, level)


def starts(forks: Sequence[Fork]) -> tuple[KVCache, Condition]:
    """Return the caches and conditions of some units' forks, all of one frame; one row each where all are of one."""
    rows = forks[:1] if all(fork is forks[0] for fork in forks) else forks
    condition = Condition.stack([fork.condition for fork in rows])
    every = {name: tensor.expand(len(forks), *tensor.shape[1:]) for name, tensor in condition.tensors.items()}
    return KVCache.stack([fork.cache for fork in rows]), Condition(every)


class Source(ABC):
    """Where branches part, how they come to differ, and what is scored of them.

    Attributes:
        average: a context in which the network has the averaged weights of the behaviour.
        addends: of a replay.
        recorded_shape: of what is recorded of a unit.
    """

    addends = 1
    recorded_shape: tuple[int, ...]

    def __init__(self, model: StreamingModel, micro_batch: int) -> None:
        self.model, self.micro_batch = model, micro_batch
        self.average: Callable[[], AbstractContextManager[None]] = nullcontext

    @abstractmethod
    def forks(self, script: Script) -> list[tuple[int, int]]:
        """Return the frames and levels at which the branches of a script may part; not empty."""

    def shared(self, prefix: Stream, fork: Fork) -> Any:
        """Draw what the branches of a group have in common of the blocks in which they differ, once for all."""
        return None

    @abstractmethod
    def explore(
        self, prefix: Stream, fork: Fork, shared: Any, samples: Sequence[Sample], rows: int
    ) -> tuple[Stream, Tensor]:
        """Draw the blocks in which these branches of a group differ.

        Args:
            prefix: one row, as far as the fork.
            shared: what `shared` has drawn.
            rows: of each network call; where there are fewer samples the last is drawn again.

        Returns:
            The stream with `rows` rows, and what is recorded, a row for each of them.
        """

    def weight(self, fork: Fork) -> float:
        """Return the factor of a unit in the objective."""
        return 1.0

    @abstractmethod
    def slot(self, fork: Fork) -> int:
        """Return the number that units have in common whose replays make the same calls."""

    @abstractmethod
    def replay(self, state: StreamState, columns: Sequence[str]) -> Iterator[Addend]:
        """Score units of one slot again; see `Process.replay`."""

    @abstractmethod
    def idle(self, slot: int, columns: Sequence[str]) -> Iterator[Tensor]:
        """Make the calls of a replay on nothing."""

    def keeps(self, columns: Sequence[str]) -> str | None:
        """Return the column that a record keeps of the weights that drew, for replays that are asked for `columns`."""
        return None

    def with_kept(self, record: Record, kept: Tensor | None) -> Record:
        """Return a record with what it keeps, a row for each unit."""
        return record

    def others(self, columns: Sequence[str]) -> dict[str, Callable[[], AbstractContextManager[None]]]:
        """Return the weights that columns compare with, by column."""
        found = {"score_base": self.model.reference, "kl": self.model.reference}
        found |= {"score_average": self.average, "kl_average": self.average}
        return {name: weights for name, weights in found.items() if name in columns}

    def call_on_nothing(self, times: int) -> None:
        """Make so many calls of the network, for the sake of other ranks."""
        x, condition = self.nothing(), self.model.nothing()
        for _ in range(times):
            self.model.velocity(x, 1.0, 0, None, condition)

    def nothing(self) -> Latents:
        """Return a block of zeros."""
        channels, _, height, width = self.model.latent_shape
        return torch.zeros(1, channels, self.model.window.block, height, width, device=self.model.device)
