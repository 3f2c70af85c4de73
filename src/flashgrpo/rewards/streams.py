"""Agreement with a caption in long videos of moving shapes, whose object begins its lane again at its end.

A clip of such a video is measured as ``flashgrpo.rewards.shapes`` measures one, but for the object's path: a step from
one frame to the next is taken modulo the lane's length, so that a return to its beginning is no motion.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flashgrpo.rewards.shapes import agreement_of, measure

LAP = 20.0
"""Length of the lane, in pixels of a frame that is ``REFERENCE_WIDTH`` wide."""


def agreement(videos: Tensor, prompts: Sequence[str], **columns: Sequence[str]) -> dict[str, Tensor]:
    """Tell how far each clip shows what its caption says, as ``flashgrpo.rewards.shapes.agreement`` does.

    Args:
        videos: (B, F, 3, H, W) in [0, 1]; of a video whose caption changes, the frames of one caption.
        prompts: B captions.
        columns: lists ``color``, ``shape``, ``direction``, ``speed`` of B words; the caption gives what is absent.
    """
    return agreement_of(measure(videos, LAP), prompts, columns)
