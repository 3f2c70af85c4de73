"""What a reward looks at: decoded frames, latents, or the encoded file.

A reward says so in an attribute `takes`; without one it gets every frame at full size, or the texts of a model that
makes those. A recipe may say otherwise
(`rewards.NAME.input`). What no reward asks for is not made: a run whose rewards all take latents decodes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float

from flashgrpo.settings import FORBID_EXTRA, MANY, check_number

Frames = Float[Any, "batch video_frames 3 video_height video_width"]


@dataclass(frozen=True)
class Pixels:
    """Decoded frames, (B, F, 3, H, W) in [0, 1], float32 on the CPU; F is 1 for images. Or texts, all as they are.

    Args:
        stride: frames between two that are taken, from the first on.
        fps: or frames nearest to this rate a second, from the first on; a video that has fewer gives all it has.
        size: pixels of the shorter side that larger frames are reduced to (bilinear, antialiased).
        first: only the first frames, this many at most. What no reward asks for is not decoded.
    """

    stride: int = 1
    fps: float | None = None
    size: int | None = None
    first: int | None = None
    kind: Literal["pixels"] = "pixels"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        for name in ("stride", "size", "first"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, 1, MANY)
        if self.fps is not None:
            check_number("fps", self.fps, 0.01, 1_000)
            if self.stride != 1:
                raise ValueError("fps takes the place of stride: give one of the two")

    def frames(self, count: int, fps: float) -> Any:
        """Return the numbers of the frames taken of `count` frames at `fps` frames a second.

        `Pixels(fps=2).frames(17, 8)` is [0, 4, 8, 12, 16].
        """
        import torch  # which settings do without

        count = min(count, self.first or count)
        if self.fps is None or self.fps >= fps:
            return torch.arange(0, count, self.stride)
        taken = torch.arange(int((count - 1) * self.fps / fps + 1e-6) + 1, dtype=torch.float64)
        return (taken * (fps / self.fps)).round().long().clamp(max=count - 1)

    def prepare(self, videos: Frames, fps: float) -> Float[Any, "batch taken 3 taken_height taken_width"]:
        """These frames of the videos at this size; the videos themselves where nothing is to be done."""
        rows = self.frames(videos.shape[1], fps)
        if len(rows) < videos.shape[1]:
            videos = videos[:, rows]
        height, width = videos.shape[-2:]
        if self.size is None or min(height, width) <= self.size:
            return videos
        scale = self.size / min(height, width)
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        from torch.nn import functional

        flat = functional.interpolate(videos.flatten(0, 1), size, mode="bilinear", antialias=True)
        return flat.clamp(0, 1).unflatten(0, videos.shape[:2])


@dataclass(frozen=True)
class LatentVideos:
    """The model's latents, (B, C, F, H, W), or its tokens, (B, ...), float32 on the CPU: nothing is decoded for it."""

    kind: Literal["latents"] = "latents"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA


@dataclass(frozen=True)
class VideoFiles:
    """Paths of B files, there as long as the call lasts: H.264 mp4 at the model's frame rate, or PNG of images."""

    kind: Literal["files"] = "files"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA


Input = Pixels | LatentVideos | VideoFiles


Kind = Literal["pixels", "latents", "files", "texts"]
"""What a reward is handed in the end."""


def kinds(takes: Input) -> list[Kind]:
    """Return what a reward may be handed: one that takes all frames as they are takes texts, too."""
    return ["pixels", "texts"] if takes == Pixels() else [takes.kind]


def decoded_for(takes: Sequence[Input]) -> int | None:
    """How many frames, from the first on, have to be decoded for these: 0 for latents alone; None is all of them."""
    pixels = [one for one in takes if not isinstance(one, LatentVideos)]
    asked = [one.first if isinstance(one, Pixels) else None for one in pixels]
    return None if None in asked else max((first for first in asked if first), default=0)
