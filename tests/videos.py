"""Reads what the package writes."""

from pathlib import Path

import imageio.v3 as iio
import torch
from torch import Tensor


def read_mp4(path: Path) -> Tensor:
    """The video as (F, 3, H, W) in [0, 1]."""
    return torch.from_numpy(iio.imread(path, plugin="FFMPEG")).permute(0, 3, 1, 2).float() / 255
