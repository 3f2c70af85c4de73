"""Reward of a prompt writer: whether the video shows what was wished, whatever caption led to it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashgrpo.rewards.shapes import ATTRIBUTES, agreement


def granted(videos: Tensor, prompts: Sequence[str], **columns: Any) -> Tensor:
    """Mean of the components of `shapes:agreement` over the attributes that a wish names, 0 to 1.

    Args:
        columns: lists `color`, `shape`, `direction`, `speed`, None where a wish leaves it open.

    Raises:
        ValueError: a wish names none.
    """
    nothing = [None] * len(prompts)
    named: dict[str, Sequence[Any]] = {name: columns.get(name, nothing) for name in ATTRIBUTES}
    wanted = {name: [one or ATTRIBUTES[name][0] for one in values] for name, values in named.items()}
    found = agreement(videos, prompts, **wanted)
    asked = torch.tensor([[named[name][row] is not None for name in ATTRIBUTES] for row in range(len(prompts))])
    if not asked.any(dim=1).all():
        bare = prompts[int((~asked.any(dim=1)).nonzero()[0])]
        raise ValueError(f'the wish "{bare}" has none of the columns {", ".join(ATTRIBUTES)}')
    values = torch.stack([found[name] for name in ATTRIBUTES], dim=1)
    return torch.where(asked, values, 0.0).sum(1) / asked.sum(1)


granted.planted_pair = agreement.planted_pair  # type: ignore[attr-defined]
