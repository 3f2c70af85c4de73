"""What a sample is to those that look at it: several frames are a video, one frame is an image, a text is a text.

What is written follows from what it is: an mp4, a PNG with every pixel as it is, or a text file.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flashgrpo.files import write_aside, write_text
from flashgrpo.types import Media, Waves
from flashgrpo.video import Film, Video, Wave, enlarged, side_by_side, to_pictures, write_mp4

Medium = Video | Film | str
"""What one sample is shown as: frames (F, 3, H, W) in [0, 1], silent or with their sound, or a text."""


@runtime_checkable
class Shows(Protocol):
    """What a process shows of samples; `outputs` are what it draws, one row for each sample."""

    def media(self, outputs: Any, frames: int | None = None) -> Media:
        """Return what rewards and the report look at: videos (B, F, 3, H, W) or B texts, all of one kind.

        An image is a video of one frame. With `frames` at least that many of each video's first.
        """
        ...

    @property
    def sample_rate(self) -> int | None:
        """Samples a second of the sound that comes with each video; None where media are silent."""
        ...

    def sound(self, outputs: Any) -> Waves:
        """Return the sound of videos, (B, channels, samples) in [-1, 1]; only where there is a `sample_rate`."""
        ...

    def captions(self, outputs: Any) -> Sequence[str]:
        """Return the texts that media are made of where the process wrote these itself, or nothing, of no sample."""
        ...


NOUNS = {".mp4": "video", ".png": "image", ".txt": "text"}


def suffix_of(medium: Medium) -> str:
    """Return the ending of the file that a medium is written to: ".mp4", ".png" or ".txt"."""
    if isinstance(medium, str):
        return ".txt"
    return ".png" if not isinstance(medium, Film) and len(medium) == 1 else ".mp4"


def with_sound(medium: Video | str, wave: Wave | None, rate: int | None) -> Medium:
    """Return a video with its sound, where it has some of that sample rate; anything else as it is."""
    return medium if wave is None or rate is None or isinstance(medium, str) else Film(medium, wave.cpu(), rate)


def write_medium(path: Path, medium: Medium, fps: float) -> None:
    """Write a medium, whole or not at all, into a file with the ending `suffix_of`.

    Raises:
        UserError: it cannot be written.
    """
    if isinstance(medium, str):
        write_text(path, medium)
    elif not isinstance(medium, Film) and len(medium) == 1:
        with write_aside(path) as aside:
            Image.fromarray(to_pictures(medium)[0]).save(aside, format="PNG")
    else:
        write_mp4(path, medium, fps)


def frames_of(medium: Medium) -> Video:
    """Return the frames of what is no text, without its sound."""
    assert not isinstance(medium, str)
    return medium if isinstance(medium, Tensor) else medium.video


LINE = 18  # pixels of a line of a label
LINES = 3  # of a label at most


def stacked(*frames: Video, gap: int = 4) -> Float[Tensor, "frames 3 total_height width"]:
    """Put frames of one shape (F, 3, H, W) below each other, with a white gap: (F, 3, sum of H + gaps, W)."""
    return side_by_side(*(one.transpose(2, 3) for one in frames), gap=gap).transpose(2, 3)


def strip(frames: Video, count: int = 5) -> Float[Tensor, "1 3 height total_width"]:
    """Return so many of the frames (F, 3, H, W), the first, the last and evenly between, side by side (1, 3, H, W')."""
    chosen = torch.linspace(0, len(frames) - 1, min(count, len(frames))).round().long()
    return side_by_side(*(frames[frame : frame + 1] for frame in chosen), gap=1)


def labelled(frames: Video, text: str) -> Float[Tensor, "frames 3 written_height written_width"]:
    """Return frames (F, 3, H, W) as large as small ones are written, with a text below them, cut to a few lines.

    The font has Latin, Greek, Cyrillic and more; what it lacks is a box.
    """
    from matplotlib import font_manager  # slow to import, and brings the font

    frames = enlarged(frames.cpu().float())
    width = frames.shape[-1]
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 12)
    fits = max(8, int(width / font.getlength("n")))
    lines = textwrap.wrap(" ".join(text.split()), fits, max_lines=LINES, placeholder=" …") or [""]
    picture = Image.new("RGB", (width, 4 + LINE * LINES), "white")
    ImageDraw.Draw(picture).multiline_text((4, 2), "\n".join(lines), fill="black", font=font, spacing=3)
    written = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255
    return torch.cat([frames, written.expand(len(frames), -1, -1, -1)], dim=2)
