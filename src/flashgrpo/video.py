"""Videos are float tensors (B, F, 3, H, W) in [0, 1]; on disk they are H.264 mp4 files, or animated gifs."""

import contextlib
import io
import os
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from flashgrpo.errors import UserError, system_reason
from flashgrpo.files import write_aside


def _popen_kwargs(prevent_sigint: bool = False) -> dict[str, Any]:
    return {"start_new_session": prevent_sigint}


if os.name == "posix":
    # An interrupt is not to reach ffmpeg, or it leaves half a file. imageio-ffmpeg sees to that with a function that
    # Python calls between fork and exec, which in a process with threads may crash or hang; a session needs none.
    imageio_ffmpeg._io._popen_kwargs = _popen_kwargs

Video = Float[Tensor, "frames 3 height width"]
Wave = Float[Tensor, "sound_channels samples"]


@dataclass(frozen=True)
class Film:
    """A video with its sound: frames (F, 3, H, W) in [0, 1], and a wave (channels, samples) in [-1, 1].

    Args:
        rate: samples of the wave a second.
    """

    video: Video
    wave: Wave
    rate: int

    def __len__(self) -> int:
        """Frames."""
        return len(self.video)


def to_pictures(frames: Float[Tensor, "frames 3 height width"]) -> UInt8[np.ndarray, "frames height width 3"]:
    """Return frames (F, 3, H, W) in [0, 1] as pictures (F, H, W, 3) of whole 8-bit levels, on the CPU."""
    return (frames.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def enlargement(height: int, width: int) -> int:
    """Return how many times larger small videos are written, by whole pixels, to have at least 192 px.

    Below that the chroma subsampling of H.264 (yuv420p, the only one that every browser decodes) smears colours over
    whole objects.
    """
    return max(1, -(-192 // min(height, width)))


def enlarged(video: Video) -> Float[Tensor, "frames 3 written_height written_width"]:
    """Return a video (F, 3, H, W) `enlargement` times larger: (F, 3, H', W')."""
    scale = enlargement(*video.shape[-2:])
    return video.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)


def write_mp4(path: Path, video: Video | Film, fps: float) -> None:
    """Write one video (F, 3, H, W) in [0, 1] as an mp4 that browsers play; `enlargement` times larger."""
    write_video_of(path, [video], fps)


def write_video_of(path: Path, pieces: Iterable[Video | Film], fps: float) -> None:
    """Write a video that comes in pieces, each (F, 3, H, W), one of them in memory at a time; see `write_mp4`.

    The sound of pieces that have some is written with them (AAC); each lasts as long as its frames. A path that ends in
    .gif gets an animated gif, which is silent, repeats itself and has 256 colours of the video's own; ffmpeg holds its
    frames until the last has come.
    """
    waves: list[Wave] = []
    rates: set[int] = set()

    def shown(piece: Video | Film) -> Video:
        if isinstance(piece, Tensor):
            return piece
        rates.add(piece.rate)
        waves.append(lasting(piece.wave, round(len(piece.video) / fps * piece.rate)))
        return piece.video

    every = (frame for piece in pieces for frame in _written(shown(piece)))
    with write_aside(path) as aside:
        first = next(every)
        count = 0
        with contextlib.closing(_encoder(aside, path.suffix == ".gif", first.shape[:2], fps)) as encoder:
            encoder.send(None)
            for frame in chain([first], every):
                encoder.send(np.ascontiguousarray(frame))
                count += 1
        for rate in rates if path.suffix != ".gif" else ():
            _add_sound(aside, torch.cat(waves, dim=1), rate)
        if not _is_whole(aside, count):  # an ffmpeg that runs out of disk prints so and says nothing to its caller
            raise UserError(f"cannot write {path}: ffmpeg could not finish the file; is the disk full?")


def _written(video: Video) -> UInt8[np.ndarray, "frames written_height written_width 3"]:
    frames = to_pictures(enlarged(video.cpu()))
    return frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]  # yuv420p has no odd sizes


MP4 = {"codec": "libx264"}, ["-crf", "18", "-movflags", "+faststart", "-f", "mp4"]
GIF = (
    {"codec": "gif", "pix_fmt_out": "pal8", "quality": None, "ffmpeg_log_level": "error"},
    ["-vf", "split[a][b];[a]palettegen[p];[b][p]paletteuse", "-f", "gif"],
)


def _encoder(path: Path, is_gif: bool, size: tuple[int, int], fps: float) -> Any:
    (codec, options), (height, width) = GIF if is_gif else MP4, size
    shape = {**codec, "macro_block_size": 1}
    return imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps, output_params=options, **shape)


def _is_whole(path: Path, frames: int) -> bool:
    try:
        return imageio_ffmpeg.count_frames_and_secs(path)[0] == frames
    except RuntimeError:
        return False


def lasting(sound: Wave, samples: int) -> Float[Tensor, "sound_channels wanted"]:
    """Return a sound with so many samples: cut at its end, or silent there."""
    return torch.nn.functional.pad(sound.float().cpu()[:, :samples], (0, max(0, samples - sound.shape[1])))


def _add_sound(path: Path, sound: Wave, rate: int) -> None:
    """Put a sound into an mp4 whose frames are written; a file that came to nothing is noticed by its frames."""
    levels = (sound.clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous().numpy()
    pcm = ["-f", "s16le", "-ar", str(rate), "-ac", str(len(sound)), "-i", "pipe:0"]
    streams = ["-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a", "aac", "-movflags", "+faststart", "-f", "mp4"]
    with tempfile.TemporaryDirectory(prefix="flashgrpo-sound-") as folder:
        whole = Path(folder) / "whole.mp4"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-i", str(path), *pcm, *streams, str(whole)]
        subprocess.run(command, input=levels.tobytes(), capture_output=True, check=False)
        path.write_bytes(whole.read_bytes() if whole.is_file() else b"")


def left_and_right(left: Wave, right: Wave) -> Float[Tensor, "2 samples"]:
    """Return a sound of two channels, each the mean of all of one sound, for two videos beside each other."""
    return torch.stack([left.float().mean(dim=0), right.float().mean(dim=0)])


def side_by_side(*videos: Video, gap: int = 4) -> Float[Tensor, "frames 3 height total_width"]:
    """Put videos of one shape beside each other with a white gap of `gap` pixels: (F, 3, H, sum of W + gaps)."""
    white = torch.ones(*videos[0].shape[:-1], gap)
    panels = [panel for video in videos for panel in (video.cpu().float(), white)]
    return torch.cat(panels[:-1], dim=-1)


FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""Kinds of pictures that are read. PIL knows more, and starts another program for some of them."""


def open_image(image: Any) -> Any:
    """Open a prompt's image as an RGB picture, as a viewer shows it.

    It is turned as its EXIF orientation says. What is transparent is white, colours of an embedded profile become sRGB,
    16 bits become 8, and of an animation the first frame is taken.

    Args:
        image: a path, a picture, the bytes of a file, or the hub's {"bytes": ..., "path": ...} of which one is given.

    Raises:
        UserError: it cannot be read.
    """
    name = image_name(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes below the limit of a decompression bomb, and of odd metadata
            if isinstance(image, Image.Image):
                picture = image
            else:
                Image.init()
                content = io.BytesIO(image_bytes(image))
                picture = Image.open(content, formats=[kind for kind in FORMATS if kind in Image.OPEN])
            picture.load()
            with contextlib.suppress(Exception):  # of metadata that are damaged, which turn nothing
                picture = ImageOps.exif_transpose(picture)
            return _as_rgb(picture)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{name} cannot be read: no picture that is known ({', '.join(FORMATS)})") from error
    except Exception as error:  # damaged files raise whatever their decoder trips over
        raise UserError(f"{name} cannot be read: {system_reason(error)[:150]}") from error


def image_bytes(image: Any) -> bytes:
    """Return what tells a prompt's image from others: a file's bytes, or a picture's size and pixels.

    Raises:
        UserError: it cannot be read.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        picture = open_image(image)
        return f"{picture.size}".encode() + bytes(picture.tobytes())
    if not isinstance(image, str):
        raise UserError(f"{image_name(image)} must be a path or a picture, not {type(image).__name__}")
    try:
        return Path(image).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{image_name(image)} cannot be read: {system_reason(error)}") from error


def image_name(image: Any) -> str:
    """Return how a sentence calls a prompt's image."""
    path = image.get("path") if isinstance(image, Mapping) else image
    return f"image {path}" if isinstance(path, str) else "a picture in column image"


def cropped(picture: Any, width: int, height: int) -> Any:
    """Cut a picture to the proportions of a frame, the same at either end; one that has them stays as it is."""
    scale = min(picture.width / width, picture.height / height)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (picture.width - inner[0]) // 2, (picture.height - inner[1]) // 2
    return picture if inner == picture.size else picture.crop((left, top, left + inner[0], top + inner[1]))


def _as_rgb(picture: Any) -> Any:
    """Return a picture of any mode of PIL as RGB."""
    if picture.mode.startswith("I"):
        levels = np.asarray(picture, dtype=np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("it holds 32-bit numbers, whose white is not known; save it with 8 or 16 bits")
        picture = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("it holds floating-point numbers, whose white is not known; save it with 8 or 16 bits")
    transparent = picture.has_transparency_data
    alpha = picture.convert("RGBA").getchannel("A") if transparent else None
    picture = _in_srgb(picture)
    if alpha is None:
        return picture
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=alpha)
    return white


def _in_srgb(picture: Any) -> Any:
    """Return a picture in RGB without its alpha, with the colours that its profile means."""
    plain = picture if picture.mode in ("RGB", "L", "CMYK", "LAB") else picture.convert("RGBA").convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return plain.convert("RGB")
        srgb: Any = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(plain, profile, srgb, outputMode="RGB")
    except (KeyError, OSError, ValueError, TypeError, ImageCms.PyCMSError, ImportError):  # none, or one of no use
        return plain.convert("RGB")
