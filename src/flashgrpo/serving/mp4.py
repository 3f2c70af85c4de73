"""Videos as mp4 bytes and back, for a wire: lossy, some fifty times smaller than pixels."""

import tempfile
from collections.abc import Generator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import torch
from jaxtyping import Float
from torch import Tensor

from flashgrpo.video import write_mp4

FPS = 16.0  # nominal: frames are counted, never timed


def to_mp4(video: Float[Tensor, "frames 3 height width"]) -> bytes:
    """Encode one video in [0, 1] as the bytes of an H.264 mp4."""
    with tempfile.TemporaryDirectory() as folder:
        write_mp4(Path(folder) / "video.mp4", video, FPS)
        return (Path(folder) / "video.mp4").read_bytes()


def is_mp4(data: bytes | memoryview) -> bool:
    """Tell whether data begins as an mp4 does. Others (a playlist, say) could make ffmpeg open further files."""
    return bytes(data[4:8]) == b"ftyp"


def from_mp4(data: bytes, shape: tuple[int, ...], limit: int) -> Float[Tensor, "frames 3 height width"]:
    """Decode the video (F, 3, H, W) in [0, 1] that `to_mp4` wrote, at its own size, where that was enlarged.

    Args:
        limit: bytes, as uint8, that it may have as it is in the file.

    Raises:
        ValueError: no video, or one of another shape.
    """
    frames, _, height, width = shape
    if not is_mp4(data):
        raise ValueError("a file is no mp4")
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(data)
        file.flush()
        with closing(_read(file.name)) as stream:
            seen_width, seen_height = next(stream)["size"]
            scale = -(-seen_height // height)
            size = [scale * height // 2 * 2, scale * width // 2 * 2]  # H.264 has no odd sizes
            if [seen_height, seen_width] != size or frames * size[0] * size[1] * 3 > limit:
                raise ValueError(f"a video of {seen_height} x {seen_width} pixels came for one of {height} x {width}")
            pictures = [torch.frombuffer(bytearray(picture), dtype=torch.uint8) for picture in islice(stream, frames)]
            if next(stream, None) is not None:
                raise ValueError(f"a video has more than {frames} frames")
    if len(pictures) != frames:
        raise ValueError(f"a video has {len(pictures)} frames in place of {frames}")
    video = torch.stack(pictures).view(frames, *size, 3).permute(0, 3, 1, 2).float() / 255
    lost = [0, scale * width - size[1], 0, scale * height - size[0]]
    video = torch.nn.functional.pad(video, lost, mode="replicate") if any(lost) else video
    return video if scale == 1 else torch.nn.functional.avg_pool2d(video, scale)


def _read(path: str) -> Generator[Any, None, None]:
    """Yield what ffmpeg says of a file, then its frames as bytes."""
    strict = ["-f", "mp4", "-protocol_whitelist", "file"]
    stream = imageio_ffmpeg.read_frames(path, input_params=strict)
    try:
        yield from stream
    except (RuntimeError, OSError) as error:  # OSError: its frames end in the middle
        raise ValueError("a file cannot be decoded as a video") from error
    finally:
        stream.close()
