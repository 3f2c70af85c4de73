"""Grids and sudokus: rewards that are counted, on answers that are known."""

import pytest
import torch

from flashgrpo.rewards import grids, sudoku

BLUE = torch.full((6, 6), 4)
CAPTION = "three red cells, the rest blue"


def with_red(*places: tuple[int, int], rest: torch.Tensor = BLUE) -> torch.Tensor:
    cells = rest.clone()
    for row, column in places:
        cells[row, column] = 0
    return cells


@pytest.mark.parametrize("pixels", [1, 3, 8])
def test_cells_are_read_as_they_were_painted_and_written(pixels):
    cells = torch.randint(6, (4, 6, 6), generator=torch.Generator().manual_seed(0))
    assert torch.equal(grids.read_cells(grids.paint(cells, pixels)), cells)
    assert torch.equal(grids.read_cells(grids.write(cells)), cells)


def test_the_edges_of_a_cell_and_faint_noise_do_not_count():
    cells = with_red((0, 0), (2, 2))[None]
    image = grids.paint(cells) + 0.05 * torch.randn(1, 1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    image[..., 16, :] = image[..., :, 16] = 1.0
    assert torch.equal(grids.read_cells(image.clamp(0, 1)), cells)
    assert (grids.read_cells(torch.ones(1, 1, 3, 48, 48)) == grids.NONE).all()
    with pytest.raises(ValueError, match="not 5 x 48"):
        grids.read_cells(torch.ones(1, 1, 3, 5, 48))


@pytest.mark.parametrize(
    ("cells", "count", "rest"),
    [
        (with_red((0, 0), (0, 1), (0, 2)), 1.0, 33 / 33),
        (with_red((0, 0), (5, 5)), 2 / 3, 32 / 33),
        (with_red(*[(0, column) for column in range(6)]), 0.0, 30 / 33),
        (BLUE, 0.0, 30 / 33),
        (with_red((0, 0), (0, 1), (0, 2), rest=torch.full((6, 6), 3)), 1.0, 0.0),
        (torch.zeros(6, 6, dtype=torch.int64), 0.0, 0.0),
    ],
)
def test_agreement_counts(cells, count, rest):
    for grid in (grids.paint(cells[None]), grids.write(cells[None])):
        assert grids.agreement(grid, [CAPTION]) == {"count": [pytest.approx(count)], "rest": [pytest.approx(rest)]}


def test_a_text_that_is_no_grid_has_no_cells():
    assert grids.agreement(["three red cells"], [CAPTION]) == {"count": [0.0], "rest": [0.0]}
    short = grids.write(with_red((0, 0), (0, 1), (0, 2))[None])[0].splitlines()[:3]
    assert grids.agreement(["\n".join(short)], [CAPTION]) == {"count": [1.0], "rest": [pytest.approx(15 / 33)]}


def test_a_patch_hangs_together_along_sides():
    cells = [with_red((0, 0), (0, 1), (1, 1)), with_red((0, 0), (1, 1), (2, 2)), with_red((0, 0), (0, 1), (4, 4)), BLUE]
    assert grids.patch(grids.paint(torch.stack(cells)), [CAPTION] * 4) == pytest.approx([1.0, 1 / 3, 2 / 3, 0.0])


@pytest.mark.parametrize("caption", ["three pink cells, the rest blue", "ten red cells, the rest blue", "red", ""])
def test_another_caption_is_refused(caption):
    with pytest.raises(ValueError, match="is not of the form"):
        grids.agreement(grids.paint(BLUE[None]), [caption])


PUZZLE = "1 _ _ 4 / _ 4 1 _ / _ 1 _ _ / 4 _ _ 1"


def test_a_sudoku_has_the_solutions_that_it_has():
    assert len(sudoku.solutions((0,) * 16)) == 288
    assert sudoku.solutions(sudoku.read_puzzle(PUZZLE)) == sudoku.solutions(sudoku.read_puzzle(PUZZLE.lower()))
    for solution in sudoku.solutions(sudoku.read_puzzle(PUZZLE)):
        rows = [solution[row * 4 : row * 4 + 4] for row in range(4)]
        assert all(sorted(row) == [1, 2, 3, 4] for row in (*rows, *zip(*rows, strict=True)))


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1", 1.0),
        ("1234341221434321", 1.0),
        ("1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2", 0.0),  # a clue is missing
        ("1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 3 1", 8 / 9),
        ("2 1 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1", 0.0),
        ("", 0.0),
    ],
)
def test_answers_of_a_sudoku(answer, share):
    assert sudoku.right([answer], [PUZZLE]) == [pytest.approx(share)]
    assert sudoku.solved([answer], [PUZZLE]) == [float(share == 1)]


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("1 _ _ 5 / _ _ _ _ / _ _ _ _ / _ _ _ _", "is no puzzle of four rows"),
        ("solve it", "is no puzzle of four rows"),
        ("1 1 _ _ / _ _ _ _ / _ _ _ _ / _ _ _ _", "has no solution"),
        ("1 2 3 4 / 3 4 1 2 / 2 1 4 3 / 4 3 2 1", "no empty cell"),
    ],
)
def test_another_puzzle_is_refused(prompt, told):
    with pytest.raises(ValueError, match=told):
        sudoku.right(["1"], [prompt])
