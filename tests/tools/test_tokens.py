"""The bundled models of tokens and their worlds: what is shipped, and the recipe that makes it."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from flashgrpo.distributed.world import single_process
from flashgrpo.models.load_tokens import load_token_model
from flashgrpo.models.settings import ModelConfig
from flashgrpo.prompts import read_prompts
from flashgrpo.rewards import grids, sudoku
from flashgrpo.types import Prompt
from tools.tokens import build, world

SIZES = {
    "uniform": {"height": 48, "width": 48, "num_frames": 1, "max_sequence_length": build.TEXT},
    "masked": {"length": 42, "max_sequence_length": build.TEXT - 1},
    "sudoku": {"length": 20, "max_sequence_length": 19},
}


def load(name: str, folder: Path):
    train = {"kind": "lora", "rank": 2, "targets": ["q_proj"]}
    config = ModelConfig.model_validate({"path": str(folder), "train": train, **SIZES[name]})
    return load_token_model(config, single_process(), seed=0)


def test_a_quarter_of_the_captions_is_held_out():
    train, heldout = world.captions(heldout=False), world.captions(heldout=True)
    assert (len(train), len(heldout), len({*train, *heldout})) == (180, 60, 240)
    parsed = [grids.parse_caption(caption) for caption in heldout]
    assert set(Counter(pair[1:] for pair in parsed).values()) == {2}
    assert Counter(pair[0] for pair in parsed).keys() == set(grids.COUNTS.values())


def test_grids_of_the_world_get_full_reward():
    captions = world.captions(heldout=False)
    cells = world.draw_grids(captions, torch.Generator().manual_seed(0))
    for shown in (grids.paint(cells), grids.write(cells)):
        assert grids.agreement(shown, captions) == {"count": [1.0] * 180, "rest": [1.0] * 180}
        assert grids.patch(shown, captions) == [1.0] * 180


def test_puzzles_have_one_solution_each_and_no_held_out_grid_is_trained_on():
    train, heldout = ({*map(sudoku.read_puzzle, world.puzzles(part))} for part in (False, True))
    solved = [{sudoku.solutions(puzzle)[0] for puzzle in part} for part in (train, heldout)]
    assert [len(part) for part in solved] == [216, 72]
    assert not solved[0] & solved[1]
    assert all(len(sudoku.solutions(puzzle)) == 1 for puzzle in (*train, *heldout))


@pytest.mark.parametrize(("name", "prompts"), [("grids", world.captions), ("sudoku", world.puzzles)])
def test_the_shipped_prompts_are_those_of_the_world(name, prompts):
    for part in ("train", "heldout"):
        found = read_prompts(f"flashgrpo:tiny/prompts/{name}/{part}.jsonl", "prompts")
        assert [prompt.text for prompt in found] == prompts(part == "heldout")


@pytest.mark.parametrize("name", SIZES)
def test_a_model_that_is_built_is_one_that_loads(name, tmp_path):
    build.build(name, tmp_path / name, steps=2)
    model = load(name, tmp_path / name)
    tokens = torch.zeros(2, model.length, dtype=torch.int64)
    condition = model.encode(
        [Prompt("two red cells, the rest blue", {})] * 2 if name != "sudoku" else [Prompt("1", {})] * 2
    )
    assert model.call(tokens, condition, lambda hidden, head: head(hidden)).shape == (2, model.length, model.vocabulary)
    assert len(model.decode(tokens)) == 2


def test_the_bundled_models_are_small():
    files = [file for name in SIZES for file in (world.TINY / name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 3e6


@pytest.mark.parametrize("name", SIZES)
def test_a_bundled_model_decodes_what_its_world_holds(name):
    model = load(name, world.TINY / name)
    if name == "sudoku":
        tokens = torch.tensor([[*model.tokenizer.convert_tokens_to_ids([*"1234", "\n"])] * 4])
        assert model.decode(tokens) == ["1234\n" * 4]
        return
    drawn = world.draw_grids(world.captions(heldout=True), torch.Generator().manual_seed(0))
    plain = torch.arange(6).view(-1, 1, 1).expand(-1, 6, 6)
    cells = torch.cat([torch.randint(6, (3, 6, 6), generator=torch.Generator().manual_seed(0)), drawn, plain])
    tokens = cells.flatten(1)
    if name == "masked":
        squares = torch.tensor(model.tokenizer.convert_tokens_to_ids([*grids.SQUARES.values(), "\n"]))
        tokens = squares[torch.nn.functional.pad(cells, (0, 1), value=6)].flatten(1)
    assert torch.equal(grids.read_cells(model.decode(tokens)), cells)
