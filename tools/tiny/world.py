"""A world of moving shapes, rendered by code: one coloured shape that moves over a plain grey background.

144 combinations of colour, shape, direction and speed, each with a caption. A balanced quarter is held out:
the bundled model is never trained on those captions, and evaluation uses nothing else.

Write the shipped prompt files again with ``python -m tools.tiny.world``.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flashgrpo.rewards.shapes import COLORS, DIRECTIONS, REFERENCE_WIDTH, SHAPES, SPEEDS, coverage

SIZE = REFERENCE_WIDTH
"""Height and width of a frame in pixels."""
FRAMES = 9
OBJECT_SIZES = (12.0, 14.0)
"""Range of the square root of the object's area, in pixels."""
GREYS = (0.20, 0.50)
"""Range of the background's brightness."""
JITTER = 4.0
"""Most pixels along either axis between the middle of the path and the middle of the picture."""
TINY = Path(__file__).parents[2] / "src/flashgrpo/models/tiny"
PROMPTS = TINY / "prompts"
SPLIT_SEED = 0


class Combination(NamedTuple):
    """One thing that can happen: ``Combination("red", "circle", "left", "slowly")``."""

    color: str
    shape: str
    direction: str
    speed: str


def caption(combination: Combination) -> str:
    """``"a red circle moving left slowly"``."""
    return "a {color} {shape} moving {direction} {speed}".format(**combination._asdict())


def all_combinations() -> list[Combination]:
    """The 144 combinations in the order of the vocabulary."""
    return [Combination(*words) for words in itertools.product(COLORS, SHAPES, DIRECTIONS, SPEEDS)]


def heldout_combinations() -> list[Combination]:
    """The 36 combinations that training never sees, in the order of the vocabulary.

    Every coloured shape gives up two of its eight motions: one slow, one quick, two places apart in a shuffled
    cycle of the directions. So each colour is held out 6 times, each shape 12, each direction 9, each speed 18.
    """
    draw = random.Random(SPLIT_SEED)
    colors, shapes, directions, speeds = (draw.sample(list(v), len(v)) for v in (COLORS, SHAPES, DIRECTIONS, SPEEDS))
    held_out = set()
    for (c, color), (s, shape) in itertools.product(enumerate(colors), enumerate(shapes)):
        for turn, speed in enumerate(speeds):
            direction = directions[(c + s + 2 * turn) % 4]
            held_out.add(Combination(color, shape, direction, speed))
    return [combination for combination in all_combinations() if combination in held_out]


def train_combinations() -> list[Combination]:
    """The other 108 combinations, in the order of the vocabulary."""
    held_out = set(heldout_combinations())
    return [combination for combination in all_combinations() if combination not in held_out]


def render(combinations: Sequence[Combination], generator: torch.Generator, frames: int = FRAMES) -> Tensor:
    """One clip for each combination, with a random size, place and background.

    The object stays inside the picture in all frames.

    Returns:
        (B, frames, 3, SIZE, SIZE) in [0, 1].
    """
    uniform = torch.rand(len(combinations), 4, generator=generator)
    size = OBJECT_SIZES[0] + (OBJECT_SIZES[1] - OBJECT_SIZES[0]) * uniform[:, 0]
    grey = GREYS[0] + (GREYS[1] - GREYS[0]) * uniform[:, 1]
    heading = torch.tensor([DIRECTIONS[c.direction] for c in combinations], dtype=torch.float32)
    travel = heading * torch.tensor([SPEEDS[c.speed] for c in combinations])[:, None] * (frames - 1)  # (B, 2) pixels

    # The widest shape of area size^2 is the triangle: 0.88 size to the corners below, that is to either side and up.
    room = (SIZE - 1) / 2 - 0.88 * size[:, None] - travel.abs() / 2  # (B, 2)
    middle = (SIZE - 1) / 2 + room.clamp(max=JITTER) * (2 * uniform[:, 2:] - 1)  # (B, 2)
    time = torch.linspace(-0.5, 0.5, frames)[None, :, None]
    center = middle[:, None] + travel[:, None] * time  # (B, F, 2)

    covered = torch.empty(len(combinations), frames, SIZE, SIZE)
    for shape in SHAPES:
        rows = [i for i, c in enumerate(combinations) if c.shape == shape]
        covered[rows] = coverage(shape, center[rows], size[rows, None].square().expand(-1, frames), SIZE, SIZE)
    color = torch.tensor([COLORS[c.color] for c in combinations])[:, None, :, None, None]
    covered = covered[:, :, None]
    return covered * color + (1 - covered) * grey[:, None, None, None, None]


def prompt_lines(combinations: Sequence[Combination]) -> str:
    """A prompt file: one JSON object a line, the caption and the columns that the reward reads."""
    return "".join(json.dumps({"prompt": caption(c), **c._asdict()}) + "\n" for c in combinations)


def write_prompts(folder: Path = PROMPTS) -> None:
    """Write ``train.jsonl`` (108 lines) and ``heldout.jsonl`` (36 lines)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text(prompt_lines(train_combinations()), encoding="utf-8")
    (folder / "heldout.jsonl").write_text(prompt_lines(heldout_combinations()), encoding="utf-8")


if __name__ == "__main__":
    write_prompts()
