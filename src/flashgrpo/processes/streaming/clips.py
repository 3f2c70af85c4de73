"""Which frames of a video rewards look at that look at parts of it."""

from collections.abc import Sequence

from flashgrpo.processes.streaming.scenes import Scene
from flashgrpo.types import Clip


def video_frame(frame: int, stride: int) -> int:
    """Return the first video frame of a latent one: 0, 1, 1 + stride, 1 + 2 stride, ..."""
    return max(0, 1 + (frame - 1) * stride)


def clips_of(scenes: Sequence[Scene], frames: int, stride: int, length: int) -> list[Clip]:
    """Cut the scenes of a video of so many latent frames into clips of about `length` video frames; see `cut`."""
    ends = [*(scene.start for scene in scenes[1:]), frames]
    return [
        Clip(first, stop, scene.prompt)
        for scene, end in zip(scenes, ends, strict=True)
        for first, stop in cut(video_frame(scene.start, stride), video_frame(end, stride), length)
    ]


def cut(first: int, stop: int, length: int) -> list[tuple[int, int]]:
    """Cut frames into parts of a length, and a last one of half to one and a half times as much.

    Example: `cut(0, 45, 12) == [(0, 12), (12, 24), (24, 36), (36, 45)]`, and `cut(0, 40, 12)[-1] == (24, 40)`.
    """
    edges = list(range(first, stop, length))
    if len(edges) > 1 and 2 * (stop - edges[-1]) < length:
        edges.pop()
    return list(zip(edges, [*edges[1:], stop], strict=True))
