"""Agreement of each block of a long video, as a reward to watch: where in the video a run gains, and where it loses.

flashgrpo evaluate RUN 'rewards.blocks={call: "tools/streaming/blocks.py:by_block", watched: true}'
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flashgrpo.rewards.streams import agreement

BLOCKS, FRAMES_OF_A_BLOCK = 8, 12  # but for the first block, which has 9


def by_block(videos: Tensor, prompts: Sequence[str], switches: Sequence[Any]) -> dict[str, Tensor]:
    """Tell how far each block's frames show the caption that holds there: block0 to block7, each (B,).

    Args:
        videos: (B, 93, 3, H, W) in [0, 1].
        prompts: B captions, of the videos' beginnings.
        switches: for each video what its prompt file says of later captions.
    """
    edges = [0, *(FRAMES_OF_A_BLOCK * block - 3 for block in range(1, BLOCKS + 1))]
    found = {}
    for block, (first, stop) in enumerate(pairwise(edges)):
        shown = [caption_at(first, *of_one) for of_one in zip(prompts, switches, strict=True)]
        found[f"block{block}"] = torch.stack(list(agreement(videos[:, first:stop], shown).values())).mean(dim=0)
    return found


def caption_at(frame: int, prompt: str, switches: Sequence[dict[str, Any]]) -> str:
    """Return the caption that holds at a frame."""
    return [prompt, *(switch["prompt"] for switch in switches or () if switch["frame"] <= frame)][-1]
