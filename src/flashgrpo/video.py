"""Videos are float tensors (B, F, 3, H, W) in [0, 1]; on disk they are H.264 mp4 files."""

from pathlib import Path
from typing import Any

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from flashgrpo.errors import UserError
from flashgrpo.files import write_aside

Video = Float[Tensor, "frames 3 height width"]


def to_pictures(frames: Float[Tensor, "frames 3 height width"]) -> UInt8[np.ndarray, "frames height width 3"]:
    """Return frames (F, 3, H, W) in [0, 1] as pictures (F, H, W, 3) of whole 8-bit levels, on the CPU."""
    return (frames.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def write_mp4(path: Path, video: Video, fps: float) -> None:
    """Write one video (F, 3, H, W) in [0, 1] as an mp4 that browsers play.

    Small videos are enlarged by whole pixels to at least 192 px, for below that the chroma subsampling of H.264
    (yuv420p, the only one that every browser decodes) smears colours over whole objects.
    """
    frames = to_pictures(video.cpu())
    scale = max(1, -(-192 // min(frames.shape[1:3])))
    frames = np.ascontiguousarray(frames.repeat(scale, axis=1).repeat(scale, axis=2))
    even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]  # yuv420p has no odd sizes
    with write_aside(path) as aside:
        iio.imwrite(
            aside,
            even,
            extension=".mp4",
            fps=fps,
            codec="libx264",
            macro_block_size=1,
            output_params=["-crf", "18", "-movflags", "+faststart"],
        )
        if not _is_whole(aside, len(even)):  # an ffmpeg that runs out of disk prints so and says nothing to its caller
            raise UserError(f"cannot write {path}: ffmpeg could not finish the file; is the disk full?")


def _is_whole(path: Path, frames: int) -> bool:
    try:
        return imageio_ffmpeg.count_frames_and_secs(path)[0] == frames
    except RuntimeError:
        return False


def side_by_side(*videos: Video, gap: int = 4) -> Float[Tensor, "frames 3 height total_width"]:
    """Put videos of one shape beside each other with a white gap of `gap` pixels: (F, 3, H, sum of W + gaps)."""
    white = torch.ones(*videos[0].shape[:-1], gap)
    panels = [panel for video in videos for panel in (video.cpu().float(), white)]
    return torch.cat(panels[:-1], dim=-1)


def open_image(image: Any) -> Any:
    """Open a prompt's image, a path or a picture, as an RGB picture.

    Raises:
        UserError: it cannot be read.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, str):
        raise UserError(f"column image must hold paths or pictures, not {type(image).__name__}")
    try:
        return Image.open(image).convert("RGB")
    except OSError as error:
        reason = (error.strerror or "no picture that is known").lower()
        raise UserError(f"image {image} cannot be read: {reason}") from error
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"image {image} cannot be read: {' '.join(str(error).split())[:150]}") from error


def image_bytes(image: Any) -> bytes:
    """Return what tells a prompt's image from others: a file's bytes, or a picture's size and pixels.

    Raises:
        UserError: it cannot be read.
    """
    if isinstance(image, str):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise UserError(f"image {image} cannot be read: {(error.strerror or str(error)).lower()}") from error
    picture = open_image(image)
    return f"{picture.size}".encode() + bytes(picture.tobytes())
