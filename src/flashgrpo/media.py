"""What a sample is to those that look at it: several frames are a video, one frame is an image, a text is a text.

What is written follows from what it is: an mp4, a PNG with every pixel as it is, or a text file.
"""

from pathlib import Path

from PIL import Image

from flashgrpo.files import write_aside, write_text
from flashgrpo.video import Video, to_pictures, write_mp4

Medium = Video | str
"""What one sample is shown as: frames (F, 3, H, W) in [0, 1], or a text."""
NOUNS = {".mp4": "video", ".png": "image", ".txt": "text"}


def suffix_of(medium: Medium) -> str:
    """Return the ending of the file that a medium is written to: ".mp4", ".png" or ".txt"."""
    if isinstance(medium, str):
        return ".txt"
    return ".png" if len(medium) == 1 else ".mp4"


def write_medium(path: Path, medium: Medium, fps: float) -> None:
    """Write a medium, whole or not at all, into a file with the ending `suffix_of`.

    Raises:
        UserError: it cannot be written.
    """
    if isinstance(medium, str):
        write_text(path, medium)
    elif len(medium) == 1:
        with write_aside(path) as aside:
            Image.fromarray(to_pictures(medium)[0]).save(aside, format="PNG")
    else:
        write_mp4(path, medium, fps)
