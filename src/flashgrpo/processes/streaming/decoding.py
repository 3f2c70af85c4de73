"""Latents of videos to frames: what several videos have in common at their beginning is decoded once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashgrpo.processes.streaming.model import StreamingModel
from flashgrpo.types import Latents, Videos


def decode(model: StreamingModel, latents: Latents, frames: int | None = None) -> Videos:
    """Return videos (B, F, 3, H, W) of latents, all together; with `frames` at least so many of each one's first.

    The decoder is causal and remembers, so the branches of a prompt share their prefix: of eight branches that fork in
    the middle of a video, 4.5 videos' worth is decoded.
    """
    last = latents.shape[2]
    if frames is not None:
        last = min(last, 1 + -(-max(0, frames - 1) // model.stride))
    latents = latents[:, :, :last]
    parts: dict[int, Tensor] = {}
    for rows in _families(latents, model.window.size(0)):
        own = latents[rows]
        shared = model.window.whole(_shared_frames(own))
        videos, state = [], None
        if shared:
            once, state = model.decode(own[:1, :, :shared])
            videos.append(once.expand(len(rows), -1, -1, -1, -1))
        if shared < last:
            branches, _ = model.decode(own[:, :, shared:], state and state.expanded(len(rows)))
            videos.append(branches)
        parts |= dict(zip(rows, torch.cat(videos, dim=1), strict=True))
    return torch.stack([parts[row] for row in range(len(latents))])


def _families(latents: Latents, first: int) -> list[list[int]]:
    """Return the rows that begin alike, bit for bit, in the order of their first."""
    families: list[list[int]] = []
    for row in range(len(latents)):
        alike = (own for own in families if torch.equal(latents[own[0], :, :first], latents[row, :, :first]))
        family = next(alike, None)
        if family is None:
            families.append([row])
        else:
            family.append(row)
    return families


def _shared_frames(latents: Latents) -> int:
    """Return for how many frames all rows are alike; 0 of a single row."""
    if len(latents) == 1:
        return 0
    equal: Sequence[bool] = (latents == latents[:1]).all(dim=1).flatten(2).all(dim=2).all(dim=0).tolist()
    return equal.index(False) if False in equal else len(equal)
