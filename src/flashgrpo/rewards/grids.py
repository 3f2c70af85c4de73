"""Rewards for the world of grids: cells of two colours, as an image or as a text, judged against their caption.

A caption says how many cells have a colour and which colour the rest have: "three red cells, the rest blue". An image
is read cell by cell, each as the colour nearest to the mean of its middle; a text has a line for each row and a square
for each cell. Everything is counted by code and graded, so that a group of samples has a spread.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from flashgrpo.types import PlantedPair, Prompt

SIZE = 6
"""Rows and columns of a grid."""
COLORS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.90, 0.15, 0.15),
    "orange": (0.95, 0.55, 0.10),
    "yellow": (0.95, 0.90, 0.20),
    "green": (0.15, 0.70, 0.25),
    "blue": (0.20, 0.30, 0.90),
    "purple": (0.60, 0.20, 0.75),
}
"""Name -> RGB in [0, 1], in the order of a colour wheel."""
SQUARES = dict(zip(COLORS, "🟥🟧🟨🟩🟦🟪", strict=True))
"""Name -> the character that stands for it in a text."""
COUNTS: Mapping[str, int] = {
    word: 2 + place for place, word in enumerate(("two", "three", "four", "five", "six", "seven", "eight", "nine"))
}
"""Word -> number of cells."""
FARTHEST = 0.3  # from a colour, in RGB, that is still taken for it
NONE = -1  # stands for what is no colour
Cells = Int64[Tensor, "batch 6 6"]

_CAPTION = re.compile(r"\s*(\w+) (\w+) cells, the rest (\w+)\s*\.?\s*", re.IGNORECASE)


def parse_caption(caption: str) -> tuple[int, int, int]:
    """Return the number of cells, their colour's number and that of the rest.

    "three red cells, the rest blue" -> (3, 0, 4).

    Raises:
        ValueError: it is no such caption.
    """
    match = _CAPTION.fullmatch(caption)
    words = [word.lower() for word in match.groups()] if match else ["", "", ""]
    if words[0] not in COUNTS or words[1] not in COLORS or words[2] not in COLORS:
        raise ValueError(
            f'the prompt "{caption}" is not of the form "COUNT COLOR cells, the rest COLOR", with a count from '
            f"two to nine and the colors {', '.join(COLORS)}"
        )
    names = list(COLORS)
    return COUNTS[words[0]], names.index(words[1]), names.index(words[2])


def read_cells(grids: Tensor | Sequence[str]) -> Cells:
    """Return the number of each cell's colour, `NONE` where it is none.

    Args:
        grids: (B, F, 3, H, W) in [0, 1], of which the last frame counts, or B texts.
    """
    if not isinstance(grids, Tensor):
        return torch.stack([torch.empty(0, SIZE, SIZE, dtype=torch.int64), *map(_read_text, grids)][1:])
    height, width = grids.shape[-2:]
    if min(height, width) < SIZE:
        raise ValueError(f"a grid of {SIZE} x {SIZE} cells has at least as many pixels, not {height} x {width}")
    pooled = torch.nn.functional.adaptive_avg_pool2d(_middles(grids[:, -1]), SIZE)
    palette = torch.tensor(list(COLORS.values()))
    apart = (pooled[:, None] - palette[None, :, :, None, None]).square().sum(2).sqrt()
    nearest = apart.min(dim=1)
    return torch.where(nearest.values > FARTHEST, NONE, nearest.indices)


def _middles(frames: Tensor) -> Tensor:
    """Cut a quarter of each cell off on every side, where cells have four pixels or more."""
    height, width = (size // SIZE for size in frames.shape[-2:])
    cells = frames[..., : height * SIZE, : width * SIZE].unflatten(-1, (SIZE, width)).unflatten(-3, (SIZE, height))
    middle = cells[..., height // 4 : height - height // 4, :, width // 4 : width - width // 4]
    return middle.flatten(-4, -3).flatten(-2, -1)


def _read_text(text: str) -> Tensor:
    known = {square: number for number, square in enumerate(SQUARES.values())}
    cells = torch.full((SIZE, SIZE), NONE)
    for row, line in enumerate(text.splitlines()[:SIZE]):
        for column, square in enumerate(line.strip()[:SIZE]):
            cells[row, column] = known.get(square, NONE)
    return cells


def agreement(videos: Tensor | Sequence[str], prompts: list[str], **columns: Any) -> dict[str, list[float]]:
    """Whether a grid shows what its caption says, in two parts from 0 to 1.

    `count` is 1 - |seen - asked| / asked, at least 0, of the cells of the first colour, and `rest` the same of the
    second, of which all other cells are asked. Gamed by leaving the first colour out: `rest` is then 2/3 or more.

    Args:
        videos: images (B, 1, 3, H, W) in [0, 1], or B texts.
    """
    found: dict[str, list[float]] = {"count": [], "rest": []}
    for cells, caption in zip(read_cells(videos), prompts, strict=True):
        asked, color, rest = parse_caption(caption)
        for part, number, wanted in (("count", color, asked), ("rest", rest, cells.numel() - asked)):
            seen = int((cells == number).sum())
            found[part].append(max(0.0, 1 - abs(seen - wanted) / wanted))
    return found


def patch(videos: Tensor | Sequence[str], prompts: list[str], **columns: Any) -> list[float]:
    """Whether the cells of the first colour hang together, as they do in all grids that the bundled models have seen.

    From 0 to 1: the share of them in their largest patch, of cells that touch along a side; 0 where there are none.
    No caption says so, and `agreement` does not ask for it: a watch.

    Args:
        videos: images (B, 1, 3, H, W) in [0, 1], or B texts.
    """
    values = []
    for cells, caption in zip(read_cells(videos), prompts, strict=True):
        left = {(row, column) for row, column in (cells == parse_caption(caption)[1]).nonzero().tolist()}
        count, largest = len(left), 0
        while left:
            edge, size = [left.pop()], 0
            while edge:
                row, column = edge.pop()
                size += 1
                near = {(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)} & left
                left -= near
                edge += near
            largest = max(largest, size)
        values.append(largest / count if count else 0.0)
    return values


def paint(cells: Cells, pixels: int = 8) -> Tensor:
    """Return images (B, 1, 3, H, W) of cells, each `pixels` wide."""
    image = torch.tensor(list(COLORS.values()))[cells].permute(0, 3, 1, 2)[:, None]
    return image.repeat_interleave(pixels, dim=-1).repeat_interleave(pixels, dim=-2)


def write(cells: Cells) -> list[str]:
    """Return texts of cells: a line for each row."""
    squares = list(SQUARES.values())
    return ["\n".join("".join(squares[color] for color in row) for row in grid) + "\n" for grid in cells.tolist()]


def _pair() -> PlantedPair:
    cells = torch.full((2, SIZE, SIZE), 4)
    cells[0, 0], cells[1, 0, :3] = 0, 0
    worse, better = paint(cells)
    return PlantedPair(Prompt("three red cells, the rest blue", {}), worse, better)


agreement.planted_pair = _pair  # type: ignore[attr-defined]
agreement.score_range = (0.0, 1.0)  # type: ignore[attr-defined]
