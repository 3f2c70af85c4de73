"""How frames look one by one: sharpness and exposure, measured from pixels."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from flashgrpo.types import PlantedPair, Prompt

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def sharpness(videos: Tensor, prompts: list[str], size: int = 256, frames: int = 8, **columns: Any) -> Tensor:
    """Logarithm of the variance of the Laplacian of the luma, mean over frames (Pech-Pacheco et al., ICPR 2000).

    Args:
        videos: (B, F, 3, H, W) in [0, 1].
        size: pixels of the shorter side that frames are reduced to, so that sizes compare; smaller ones stay.
        frames: looked at, spread evenly over the video.

    Returns:
        (B,), -11.5 for a uniform picture, higher the more edges there are. Gamed by noise and by hard edges everywhere:
        watch it rather than train on it alone.
    """
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    values = []
    for video in videos:
        gray = reduced(luma(pick(video, frames))[:, None], size)
        edges = functional.conv2d(gray, kernel).flatten(1)
        values.append((edges.var(dim=1, correction=0) + 1e-5).log().mean())
    return torch.stack(values)


def exposure(videos: Tensor, prompts: list[str], frames: int = 8, **columns: Any) -> Tensor:
    """How close pixels are to mid-grey: `mean exp(-(luma - 0.5)^2 / (2 0.2^2))` (Mertens et al., 2007).

    Args:
        videos: (B, F, 3, H, W) in [0, 1].
        frames: looked at, spread evenly over the video.

    Returns:
        (B,) in [0.04, 1]. Gamed by a uniform grey.
    """
    return torch.stack([torch.exp(-((luma(pick(video, frames)) - 0.5) ** 2) / 0.08).mean() for video in videos])


def pick(video: Float[Tensor, "frames 3 height width"], count: int) -> Float[Tensor, "picked 3 height width"]:
    """Pick `count` frames, spread evenly, the first and the last among them; all where there are no more."""
    return video[torch.linspace(0, len(video) - 1, min(count, len(video))).round().long()].float()


def reduced(
    pictures: Float[Tensor, "frames channels height width"], size: int
) -> Float[Tensor, "frames channels reduced_height reduced_width"]:
    """Return pictures whose shorter side has at most `size` pixels; smaller ones stay as they are."""
    if (shorter := min(pictures.shape[-2:])) <= size:
        return pictures
    return functional.interpolate(pictures, scale_factor=size / shorter, mode="bilinear", antialias=True)


def luma(frames: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames height width"]:
    """Return the brightness as seen (BT.601)."""
    return (frames * torch.tensor(LUMA).view(3, 1, 1)).sum(dim=1)


def _checks() -> Tensor:
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    return ((x // 8 + y // 8) % 2).float().expand(2, 3, 64, 64)


def _sharp_pair() -> PlantedPair:
    blurred = functional.avg_pool2d(_checks(), 7, stride=1, padding=3)
    return PlantedPair(Prompt("a chessboard", {}), worse=blurred, better=_checks())


def _exposed_pair() -> PlantedPair:
    return PlantedPair(Prompt("a chessboard", {}), worse=_checks(), better=_checks() / 2 + 0.25)


sharpness.planted_pair = _sharp_pair  # type: ignore[attr-defined]
exposure.planted_pair = _exposed_pair  # type: ignore[attr-defined]
