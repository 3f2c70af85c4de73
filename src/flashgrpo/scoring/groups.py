"""Samples kept until all of their prompt group are there, for rewards that compare the samples of a group."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashgrpo.distributed.world import World
from flashgrpo.errors import SharedError
from flashgrpo.process import Outputs
from flashgrpo.types import Media, Waves


@dataclass(frozen=True)
class Group:
    """All samples of a prompt group, in their order: numbers among all samples, media, what was drawn, and sound."""

    numbers: list[int]
    media: Media | None
    outputs: Outputs | None
    sound: Waves | None


class Groups:
    """Parts of groups that wait for the rest: their media stay in memory until then.

    Args:
        group_of: the number of each sample's group.
    """

    def __init__(self, group_of: Sequence[int]) -> None:
        self._group_of, self._size = group_of, Counter(group_of)
        self._parts: dict[int, dict[int, tuple[Any, ...]]] = defaultdict(dict)

    def completed_by(
        self, numbers: Sequence[int], media: Media | None, outputs: Outputs | None, sound: Waves | None = None
    ) -> Iterator[Group]:
        """Take some samples, and yield the groups that are whole with them."""
        for row, number in enumerate(numbers):
            group = self._group_of[number]
            self._parts[group][number] = tuple(None if of is None else of[row] for of in (media, outputs, sound))
            if len(self._parts[group]) == self._size[group]:
                parts = sorted(self._parts.pop(group).items())
                every = [_joined(rows) for rows in zip(*(forms for _, forms in parts), strict=True)]
                yield Group([number for number, _ in parts], *every)

    def refuse_divided(self, name: str, world: World) -> None:
        """Refuse a reward that compares where the samples of a group lie on several ranks.

        Raises:
            SharedError: they do.
        """
        of, ranks = self._group_of, range(0, world.size, world.context)
        starts = [start for rank in ranks if 0 < (start := world.share(len(of), rank).start) < len(of)]
        if any(of[start - 1] == of[start] for start in starts):
            raise SharedError(
                f"rewards.{name} compares the samples of a group, and here groups are divided among processes; "
                "make rollout.prompts a multiple of their number"
            )


def _joined(rows: Sequence[Any]) -> Any:
    if rows[0] is None:
        return None
    return torch.stack([*rows]) if isinstance(rows[0], Tensor) else [*rows]
