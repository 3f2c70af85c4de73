"""Rewards for sudokus of 4 x 4: a puzzle is a line, "1 _ _ 4 / _ 4 1 _ / ...", and its answer four lines of digits."""

from functools import lru_cache
from typing import Any

from flashgrpo.types import PlantedPair, Prompt

SIZE = 4
Grid = tuple[int, ...]
"""16 digits, row by row; 0 where there is none."""


def read_puzzle(prompt: str) -> Grid:
    """Return the cells of a puzzle: four rows between slashes, of four digits or underscores each.

    Raises:
        ValueError: it is no such puzzle.
    """
    cells = prompt.replace("/", " ").split()
    if len(cells) != SIZE * SIZE or not set(cells) <= {*"1234_"}:
        raise ValueError(
            f'the prompt "{prompt}" is no puzzle of four rows like "1 _ _ 4 / _ 4 1 _ / _ _ _ _ / 4 _ 2 _"'
        )
    return tuple(0 if cell == "_" else int(cell) for cell in cells)


def read_answer(text: str) -> Grid:
    """Return the first 16 characters that are no blanks, 0 for those that are no digits from 1 to 4."""
    cells = "".join(text.split())[: SIZE * SIZE].ljust(SIZE * SIZE)
    return tuple(int(cell) if cell in "1234" else 0 for cell in cells)


@lru_cache(maxsize=4096)
def solutions(puzzle: Grid) -> tuple[Grid, ...]:
    """Return all fillings of a puzzle whose rows, columns and quarters have each digit once."""
    try:
        place = puzzle.index(0)
    except ValueError:
        return (puzzle,)
    taken = {puzzle[other] for other in _SEES[place]}
    return tuple(
        grid
        for digit in range(1, SIZE + 1)
        if digit not in taken
        for grid in solutions((*puzzle[:place], digit, *puzzle[place + 1 :]))
    )


def _sees(place: int) -> set[int]:
    row, column = divmod(place, SIZE)
    same = {(row, other) for other in range(SIZE)} | {(other, column) for other in range(SIZE)}
    same |= {(row // 2 * 2 + down, column // 2 * 2 + right) for down in range(2) for right in range(2)}
    return {SIZE * down + right for down, right in same} - {place}


_SEES = [_sees(place) for place in range(SIZE * SIZE)]


def right(texts: list[str], prompts: list[str], **columns: Any) -> list[float]:
    """Share of the empty cells that are filled as in a solution, the nearest where there are several; 0 to 1.

    An answer that changes a clue gets 0.

    Raises:
        ValueError: a prompt is no puzzle, or one without a solution or an empty cell.
    """
    values = []
    for text, prompt in zip(texts, prompts, strict=True):
        puzzle, answer = read_puzzle(prompt), read_answer(text)
        empty = [place for place, clue in enumerate(puzzle) if not clue]
        found = solutions(puzzle)
        if not found or not empty:
            raise ValueError(f'the puzzle "{prompt}" has no solution, or no empty cell')
        kept = all(given == clue for given, clue in zip(answer, puzzle, strict=True) if clue)
        best = max(sum(answer[place] == solution[place] for place in empty) for solution in found)
        values.append(best / len(empty) if kept else 0.0)
    return values


def solved(texts: list[str], prompts: list[str], **columns: Any) -> list[float]:
    """Return 1 for an answer that is a solution of its puzzle, and 0 for any other."""
    return [float(value == 1) for value in right(texts, prompts)]


_PAIR = PlantedPair(
    Prompt("1 _ _ 4 / _ 4 1 _ / _ 1 4 _ / 4 _ _ 1", {}),
    "1 2 3 4\n3 4 1 3\n2 1 4 2\n4 3 2 1\n",
    "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1\n",
)
for _reward in (right, solved):
    _reward.planted_pair, _reward.score_range = _PAIR, (0.0, 1.0)  # type: ignore[attr-defined]
