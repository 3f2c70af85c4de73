"""The world of moving shapes for long videos: an object moves along a lane, and at its end begins again.

So every caption of the short clips says what happens for as long as a video lasts, with whole objects only, which the
bundled autoencoder knows. An object begins again between two latent frames. A caption may change at a block's first
frame: then colour, shape, direction and speed become those of the new one; size, background and the lane's middle stay.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flashgrpo.rewards.shapes import COLORS, DIRECTIONS, SHAPES, SPEEDS, coverage
from flashgrpo.rewards.streams import LAP
from tools.tiny.world import (
    GREYS,
    JITTER,
    OBJECT_SIZES,
    PROMPTS,
    SIZE,
    Combination,
    caption,
    heldout_combinations,
    train_combinations,
)

BLOCK = 3
"""Latent frames that are drawn together."""
BLOCKS = 8
LATENT_FRAMES = BLOCK * BLOCKS
STRIDE = 4
"""Video frames of a latent frame; the first has one."""
FRAMES = 1 + STRIDE * (LATENT_FRAMES - 1)


SWITCHED = (4, 5)
"""Blocks at which the prompts of the bundled recipe switch."""


class Script(NamedTuple):
    """What a video shows: one combination, and from block `switch` on another; `switch` is BLOCKS where there is none.

    Example: `Script(first, second, 4)` shows `second` from latent frame 12, that is video frame 45, on.
    """

    first: Combination
    second: Combination
    switch: int


def first_video_frame(block: int) -> int:
    """Return the first video frame of a block: 0, 9, 21, 33, ..."""
    return max(0, STRIDE * BLOCK * block - STRIDE + 1)


def draw_scripts(
    combinations: Sequence[Combination], count: int, switched: float, switches: Sequence[int], seed: int
) -> list[Script]:
    """Draw scripts of the combinations; each comes equally often first. A share `switched` of them has a switch."""
    draw = random.Random(seed)
    scripts = []
    for number in range(count):
        if number % len(combinations) == 0:
            order = draw.sample(list(combinations), len(combinations))
        first = order[number % len(combinations)]
        second = draw.choice([other for other in combinations if other != first])
        scripts.append(Script(first, second, draw.choice(switches) if draw.random() < switched else BLOCKS))
    return scripts


def render(scripts: Sequence[Script], generator: torch.Generator) -> Tensor:
    """Render one video for each script, with a random size, place, background and first place on the lane.

    The object stays inside the picture in all frames.

    Returns:
        (B, FRAMES, 3, SIZE, SIZE) in [0, 1].
    """
    uniform = torch.rand(len(scripts), 5, generator=generator)
    side = OBJECT_SIZES[0] + (OBJECT_SIZES[1] - OBJECT_SIZES[0]) * uniform[:, 0]
    grey = GREYS[0] + (GREYS[1] - GREYS[0]) * uniform[:, 1]
    shown, along = [], []
    for script, start in zip(scripts, uniform[:, 4].tolist(), strict=True):
        switch = first_video_frame(script.switch)
        shown.append([script.first if frame < switch else script.second for frame in range(FRAMES)])
        begin = int(start * lap_frames(script.first)) // STRIDE * STRIDE
        frames = [begin + frame + STRIDE - 1 if frame < switch else frame - switch for frame in range(FRAMES)]
        along.append([place_on_lane(c, frame) for c, frame in zip(shown[-1], frames, strict=True)])
    heading = torch.tensor([[DIRECTIONS[c.direction] for c in row] for row in shown], dtype=torch.float32)
    path = heading * torch.tensor(along)[..., None]  # (B, F, 2) pixels from the lane's middle, x and y

    # As in the world of short clips: the triangle is the widest shape, 0.88 of its side from its middle.
    room = (SIZE - 1) / 2 - 0.88 * side[:, None] - path.abs().amax(dim=1)
    center = (SIZE - 1) / 2 + (room.clamp(max=JITTER) * (2 * uniform[:, 2:4] - 1))[:, None] + path
    covered = torch.zeros(*center.shape[:2], SIZE, SIZE)
    for shape in SHAPES:
        here = torch.tensor([[c.shape == shape for c in row] for row in shown])
        covered[here] = coverage(shape, center[here], side.square()[:, None].expand_as(here)[here], SIZE, SIZE)
    color = torch.tensor([[COLORS[c.color] for c in row] for row in shown])[..., None, None]
    return covered[:, :, None] * color + (1 - covered[:, :, None]) * grey[:, None, None, None, None]


def lap_frames(combination: Combination) -> int:
    """Return the frames of a lap: 20 slowly, 8 quickly, whole latent frames both."""
    return round(LAP / SPEEDS[combination.speed])


def place_on_lane(combination: Combination, frame: int) -> float:
    """Return the pixels from the lane's middle in a frame, counted from the beginning of a lap."""
    frames = lap_frames(combination)
    return SPEEDS[combination.speed] * (frame % frames - (frames - 1) / 2)


def write_prompts(folder: Path = PROMPTS) -> None:
    """Write the prompts of long videos: each combination is the first of one, which switches to another."""
    for name, combinations, seed in (("train", train_combinations(), 0), ("heldout", heldout_combinations(), 1)):
        lines = []
        for script in draw_scripts(combinations, len(combinations), 1.0, SWITCHED, seed):
            frame, second = first_video_frame(script.switch), caption(script.second)
            switch = {"frame": frame, "prompt": second}
            lines.append(json.dumps({"prompt": caption(script.first), "switches": [switch]}) + "\n")
        (folder / f"streaming-{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_prompts()
