"""Whether a text that the prompt asks for can be read in the video, by optical character recognition."""

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashgrpo.errors import UserError, install_hint
from flashgrpo.rewards.frames import pick
from flashgrpo.video import to_pictures


def spelling(
    videos: Tensor, prompts: list[str], text: list[str], frames: int = 3, size: int = 480, **columns: Any
) -> Tensor:
    """One minus the edit distance between what is read and what was asked, over the length asked; mean over frames.

    The OCR task of Flow-GRPO (arXiv 2505.05470), read with rapidocr, whose models come with its package. Case and
    spaces do not count. A text that occurs whole scores 1; otherwise what is read beside it costs.

    Args:
        videos: (B, F, 3, H, W) in [0, 1].
        text: what each video should show, the prompt file's column `text`.
        frames: looked at, spread evenly over the video.
        size: pixels of the longer side that larger frames are reduced to.

    Returns:
        (B,) in [0, 1]. Gamed by writing the text all over the picture.

    Raises:
        ValueError: a video has no text to show.
    """
    if any(not _letters(wanted or "") for wanted in text):
        raise ValueError("the column text must name what each video shows")
    scores = []
    for video, wanted in zip(videos, text, strict=True):
        readings = [_read(frame, size) for frame in pick(video, frames)]
        scores.append(sum(similarity(reading, wanted) for reading in readings) / len(readings))
    return torch.tensor(scores)


def similarity(reading: str, wanted: str) -> float:
    """1 where `wanted` is in `reading`, else 1 - min(distance, length) / length of the letters.

    `similarity("HELO", "hello") = 1 - 1/5`; case and spaces do not count.
    """
    read, asked = _letters(reading), _letters(wanted)
    if asked in read:
        return 1.0
    return 1 - min(edit_distance(read, asked), len(asked)) / len(asked)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements. `edit_distance("kitten", "sitting") = 3`."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1]


def _letters(text: str) -> str:
    return "".join(text.lower().split())


def _read(frame: Tensor, size: int) -> str:
    longer = max(frame.shape[-2:])
    if longer > size:
        frame = torch.nn.functional.interpolate(
            frame[None], scale_factor=size / longer, mode="bilinear", antialias=True
        )[0]
    (picture,) = to_pictures(frame[None])
    result = _reader()(picture[:, :, ::-1])  # OpenCV's order of colours
    return " ".join(result.txts or ())


@lru_cache(maxsize=1)
def _reader() -> Any:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError(f"rewards.text needs rapidocr: {install_hint('rewards')}") from error
    logging.getLogger("RapidOCR").setLevel(logging.WARNING)
    return RapidOCR(params={"Global.log_level": "warning"})
