"""Videos as mp4 bytes and back, for a wire: lossy, some fifty times smaller than pixels."""

import tempfile
from contextlib import closing
from pathlib import Path

import imageio_ffmpeg
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from flashgrpo.video import enlargement, write_mp4

FPS = 16.0  # nominal: frames are counted, never timed


def to_mp4(video: Float[Tensor, "frames 3 height width"]) -> bytes:
    """Encode one video in [0, 1] as the bytes of an H.264 mp4."""
    with tempfile.TemporaryDirectory() as folder:
        write_mp4(Path(folder) / "video.mp4", video, FPS)
        return (Path(folder) / "video.mp4").read_bytes()


def ending_of(data: bytes | memoryview) -> str:
    """Return ".mp4" or ".png" of data that begins as such a file does, else nothing.

    Others (a playlist, say) could make ffmpeg open further files.
    """
    if bytes(data[4:8]) == b"ftyp":
        return ".mp4"
    return ".png" if bytes(data[:8]) == b"\x89PNG\r\n\x1a\n" else ""


def read_mp4(data: bytes | memoryview, video: Float[Tensor, "frames 3 height width"]) -> None:
    """Decode what `to_mp4` wrote into `video`, at its own size where that was enlarged, one frame at a time.

    Raises:
        ValueError: no video, or one of another shape.
    """
    if ending_of(data) != ".mp4":
        raise ValueError("a file is no mp4")
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(data)
        file.flush()
        try:
            _decode(file.name, video)
        except (RuntimeError, OSError) as error:  # OSError: its frames end in the middle
            raise ValueError("a file cannot be decoded as a video of the size that it is said to have") from error


def _decode(path: str, video: Tensor) -> None:
    frames, _, height, width = video.shape
    scale = enlargement(height, width)
    size = [scale * height // 2 * 2, scale * width // 2 * 2]  # H.264 has no odd sizes
    largest = (size[0] + 64) * (size[1] + 64)  # a picture that ffmpeg makes room for: macroblocks are whole
    strict = ["-f", "mp4", "-protocol_whitelist", "file", "-threads", "1", "-max_pixels", str(largest)]
    count = 0
    with closing(imageio_ffmpeg.read_frames(path, input_params=strict)) as stream:
        seen_width, seen_height = next(stream)["size"]
        if [seen_height, seen_width] != size:
            raise ValueError(f"a video of {seen_height} x {seen_width} pixels came for one of {height} x {width}")
        for picture in stream:
            if count == frames:
                raise ValueError(f"a video has more than {frames} frames")
            frame = torch.frombuffer(bytearray(picture), dtype=torch.uint8).view(*size, 3).permute(2, 0, 1) / 255
            lost = [0, scale * width - size[1], 0, scale * height - size[0]]
            video[count] = functional.avg_pool2d(functional.pad(frame, lost, mode="replicate"), scale)
            count += 1
    if count != frames:
        raise ValueError(f"a video has {count} frames in place of {frames}")
