"""The two worlds of the bundled token models: grids of two colours with captions, and sudokus of 4 x 4.

A grid has a patch of two to nine cells of one colour that hang together, and the rest in another. Of the 240 captions
every pair of colours gives up two of its eight counts: 60 are held out. Of the 288 filled sudokus 72 are held out, with
all their puzzles. The bundled models are never trained on what is held out, and evaluation uses nothing else.

Write the shipped prompt files again with ``python -m tools.tokens.world``.
"""

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flashgrpo.rewards.grids import COLORS, COUNTS, SIZE, parse_caption
from flashgrpo.rewards.sudoku import Grid, solutions

TINY = Path(__file__).parents[2] / "src/flashgrpo/models/tiny"
SPLIT_SEED = 0
CLUES = 6  # of a puzzle in the prompt files, which has one solution


def captions(heldout: bool) -> list[str]:
    """Return the captions of training, or those held out, in the order of the vocabulary."""
    pairs = list(itertools.permutations(COLORS, 2))
    turns = random.Random(SPLIT_SEED).sample(range(len(pairs)), len(pairs))
    found = []
    for pair, turn in zip(pairs, turns, strict=True):
        out = {turn % len(COUNTS), (turn + len(COUNTS) // 2) % len(COUNTS)}
        for place, count in enumerate(COUNTS):
            if (place in out) == heldout:
                found.append(f"{count} {pair[0]} cells, the rest {pair[1]}")
    return found


def draw_grids(captions: Sequence[str], generator: torch.Generator) -> Tensor:
    """Draw a grid for each caption, (B, 6, 6): a patch grows from a random cell by random neighbours."""
    asked = torch.tensor([parse_caption(caption) for caption in captions])
    patch = torch.nn.functional.one_hot(torch.randint(SIZE * SIZE, (len(asked),), generator=generator), SIZE * SIZE)
    patch = patch.view(-1, 1, SIZE, SIZE).float()
    cross = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    for size in range(1, max(COUNTS.values())):
        beside = (torch.nn.functional.conv2d(patch, cross, padding=1) > 0) & (patch == 0)
        score = torch.rand(patch.shape, generator=generator).masked_fill(~beside, -1).flatten(1)
        new = torch.nn.functional.one_hot(score.argmax(1), SIZE * SIZE).view_as(patch)
        patch = patch + new * (asked[:, 0] > size).view(-1, 1, 1, 1)
    color, rest = asked[:, 1].view(-1, 1, 1), asked[:, 2].view(-1, 1, 1)
    return torch.where(patch[:, 0] > 0, color, rest)


def sudokus(heldout: bool) -> list[Grid]:
    """Return the filled sudokus of training, or those held out."""
    every = list(solutions((0,) * 16))
    out = set(random.Random(SPLIT_SEED).sample(range(len(every)), len(every) // 4))
    return [grid for number, grid in enumerate(every) if (number in out) == heldout]


def puzzle_of(grid: Grid, clues: int, draw: random.Random) -> Grid:
    """Leave some clues of a filled sudoku, such that it is the only solution."""
    while True:
        kept = set(draw.sample(range(len(grid)), clues))
        puzzle = tuple(digit if place in kept else 0 for place, digit in enumerate(grid))
        if len(solutions(puzzle)) == 1:
            return puzzle


def write_puzzle(puzzle: Grid) -> str:
    """Write a puzzle as prompts have it: "1 _ _ 4 / _ 4 1 _ / ..."."""
    cells = [str(digit or "_") for digit in puzzle]
    return " / ".join(" ".join(cells[first : first + 4]) for first in range(0, 16, 4))


def puzzles(heldout: bool) -> list[str]:
    """Return a puzzle of each filled sudoku."""
    draw = random.Random(SPLIT_SEED + 1 + heldout)
    return [write_puzzle(puzzle_of(grid, CLUES, draw)) for grid in sudokus(heldout)]


def write_prompts(folder: Path = TINY / "prompts") -> None:
    """Write the prompt files."""
    for name, prompts in (("grids", captions), ("sudoku", puzzles)):
        for part in ("train", "heldout"):
            lines = [json.dumps({"prompt": prompt}) for prompt in prompts(part == "heldout")]
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_prompts()
