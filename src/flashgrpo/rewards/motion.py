"""How videos move: amount and smoothness of the motion by optical flow, and flicker of the brightness."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flashgrpo.errors import UserError, install_hint
from flashgrpo.rewards.frames import luma, reduced
from flashgrpo.types import PlantedPair, Prompt

Flow = Float[np.ndarray, "height width 2"]


def amount(videos: Tensor, prompts: list[str], size: int = 128, **columns: Any) -> Tensor:
    """Mean length of the optical flow from a frame to the next, in percent of the frame's diagonal.

    Flow by Farneback's method (SCIA 2003) through OpenCV. Meant for balance: rewards for quality often prefer videos
    that stand still.

    Args:
        videos: (B, F, 3, H, W) in [0, 1], two frames at least.
        size: pixels of the shorter side that frames are reduced to; smaller ones stay.

    Returns:
        (B,), 0 for a still. Gamed by camera shake, flashes and noise: watch `smoothness` and `flicker` beside it.
    """
    return torch.tensor([np.mean([_lengths(flow).mean() for flow in _flows(v, size)]) for v in videos]).float()


def smoothness(videos: Tensor, prompts: list[str], size: int = 128, **columns: Any) -> Tensor:
    """Minus the mean change of the flow from one pair of frames to the next, in percent of the frame's diagonal.

    Args:
        videos: (B, F, 3, H, W) in [0, 1], three frames at least.
        size: as in `amount`.

    Returns:
        (B,), 0 for a still or a steady motion, below 0 where it jerks. Gamed by standing still.
    """
    scores = []
    for video in videos:
        flows = list(_flows(video, size))
        changes = [_lengths(after - before).mean() for before, after in itertools.pairwise(flows)]
        scores.append(-np.mean(changes) if changes else 0.0)
    return torch.tensor(scores).float()


def flicker(videos: Tensor, prompts: list[str], **columns: Any) -> Tensor:
    """Minus the mean second difference of the frames' mean luma, in levels of 255: pumping brightness, not motion.

    Args:
        videos: (B, F, 3, H, W) in [0, 1], three frames at least.

    Returns:
        (B,), 0 where the brightness is constant or changes steadily, below 0 where it flickers. Gamed by a still.
    """
    brightness = torch.stack([luma(video.float()).mean(dim=(1, 2)) for video in videos])
    return -255 * brightness.diff(n=2, dim=1).abs().mean(dim=1)


def _flows(video: Tensor, size: int) -> Iterator[Flow]:
    """Yield the flow between consecutive frames, in percent of the diagonal."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(f"rewards.motion needs OpenCV: {install_hint('rewards')}") from error
    if len(video) < 2:
        raise ValueError("motion needs two frames at least")
    gray = reduced(luma(video.float())[:, None], size)
    pictures = (gray[:, 0].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    diagonal = float(np.hypot(*pictures.shape[1:]))
    for before, after in itertools.pairwise(pictures):
        flow = np.empty((*before.shape, 2), np.float32)
        yield cv2.calcOpticalFlowFarneback(before, after, flow, 0.5, 3, 15, 3, 5, 1.2, 0) * (100 / diagonal)


def _lengths(flow: Flow) -> Float[np.ndarray, "height width"]:
    return np.linalg.norm(flow, axis=-1)


def _moving_square(places: list[int], light: list[float] | None = None) -> Tensor:
    """Draw a bright square on a textured ground, at these places, under this light."""
    ground = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0)) * 0.3
    frames = []
    for place, brightness in zip(places, light or [1.0] * len(places), strict=True):
        frame = ground.clone()
        frame[:, 20:44, place : place + 24] = 0.9
        frames.append(frame * brightness)
    return torch.stack(frames)


def _pair(worse: Tensor, better: Tensor) -> PlantedPair:
    return PlantedPair(Prompt("a square moving right", {}), worse=worse, better=better)


STEADY = [4, 8, 12, 16, 20, 24]
amount.planted_pair = lambda: _pair(_moving_square([4] * 6), _moving_square(STEADY))  # type: ignore[attr-defined]
smoothness.planted_pair = lambda: _pair(_moving_square([4, 12, 8, 18, 12, 24]), _moving_square(STEADY))  # type: ignore[attr-defined]
flicker.planted_pair = lambda: _pair(  # type: ignore[attr-defined]
    _moving_square(STEADY, [1.0, 0.7, 1.0, 0.7, 1.0, 0.7]), _moving_square(STEADY)
)
