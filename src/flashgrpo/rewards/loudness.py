"""How loud a video's sound is: an example of a reward that hears, which needs no network.

It says nothing about what is heard: a constant hum at the wanted level has the highest score. Use it to see that a run
learns from sound, and as a pattern of a reward that judges speech, music or how sound and picture go together.
"""

from typing import Any

import torch
from torch import Tensor

from flashgrpo.scoring.inputs import LatentVideos
from flashgrpo.types import Waves

SILENCE = -60.0  # dBFS; below it nothing is told apart


def loudness(
    videos: Any, prompts: list[str], audio: Waves, sample_rate: int, level: float = -20.0, **columns: Any
) -> Tensor:
    """Minus the decibels between the sound's level and the wanted one.

    The level is the root mean square over all channels and samples, in dB below full scale (dBFS): 0 is a square wave
    of amplitude 1, and a sine of amplitude 1 has -3.01.

    Args:
        videos: not looked at.
        audio: (B, channels, samples) in [-1, 1].
        sample_rate: samples a second; a level does not depend on it.
        level: that is wanted, dBFS.

    Returns:
        (B,), at most 0.
    """
    power = audio.double().square().flatten(1).mean(dim=1)
    return -((10 * torch.log10(power)).clamp(min=SILENCE) - level).abs()


loudness.hears = True  # type: ignore[attr-defined]
loudness.takes = LatentVideos()  # type: ignore[attr-defined]  # so that no picture is decoded for it
loudness.score_range = (None, 0.0)  # type: ignore[attr-defined]
