"""How well frames compress: a reward that needs no network, for a first run of a model.

The task of DDPO (arXiv 2305.13301). It says nothing about quality and is easily gamed: the best video by
`compressibility` is a uniform grey. Use it to see that a run learns, and another reward for anything else.
"""

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flashgrpo.rewards.frames import pick
from flashgrpo.types import PlantedPair, Prompt
from flashgrpo.video import to_pictures


def compressibility(videos: Tensor, prompts: list[str], quality: int = 90, frames: int = 8, **columns: Any) -> Tensor:
    """Minus the kilobytes that a frame takes as a JPEG, mean over `frames` frames spread evenly over the video.

    Args:
        videos: (B, F, 3, H, W) in [0, 1].
        quality: of the JPEG, 1 to 95.
        frames: looked at; all of them where a video has fewer.

    Returns:
        (B,), below 0; it grows with the size of the frames.
    """
    return torch.tensor([-_kilobytes(video, quality, frames) for video in videos])


def _kilobytes(video: Tensor, quality: int, frames: int) -> float:
    sizes = []
    for picture in to_pictures(pick(video, frames)):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        sizes.append(file.tell() / 1000)
    return sum(sizes) / len(sizes)


def _planted_pair() -> PlantedPair:
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return PlantedPair(Prompt("anything", {}), worse=noise, better=torch.full_like(noise, 0.5))


compressibility.planted_pair = _planted_pair  # type: ignore[attr-defined]
