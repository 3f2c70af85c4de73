"""What AGRPO's paper finds: steps scored in the states that they saw learn more than in a state that is all masks.

Sudokus of 4 x 4 with four clues, one cell a step. The policy is a perceptron that was trained to fill masks of grids in
which a third of the cells are wrong.
"""

from contextlib import nullcontext
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional

from flashgrpo.distributed.world import single_process
from flashgrpo.learning.experience import compare, draw_and_score
from flashgrpo.learning.objective import Clipped
from flashgrpo.learning.optim import Optimizer
from flashgrpo.learning.settings import Credit, OptimConfig
from flashgrpo.learning.update import policy_update
from flashgrpo.processes.tokens.masked.process import MaskedProcess
from flashgrpo.processes.tokens.masked.settings import MaskedRollout, MaskedSampling, UnmaskedSteps, Unmasking
from flashgrpo.rewards.sudoku import solutions
from flashgrpo.types import Condition, Prompt, PromptGroup, RewardTable
from tests.tokens import TokenDouble

CELLS, DIGITS, MASK, CLUES = 16, 4, 4, 4
EMPTY = CELLS - CLUES
ROWS = [[4 * row + column for column in range(4)] for row in range(4)]
QUARTERS = [[8 * up + 2 * left + cell for cell in (0, 1, 4, 5)] for up, left in product(range(2), repeat=2)]
UNITS = torch.tensor([*ROWS, *map(list, zip(*ROWS, strict=True)), *QUARTERS])
WORLD = single_process()


def grids() -> torch.Tensor:
    """All 288 filled grids, (288, 16), digits from 0."""
    return torch.tensor(solutions((0,) * CELLS)) - 1


def puzzle(generator: torch.Generator, of: torch.Tensor) -> Prompt:
    """A grid with four of its cells as clues; the rest is masks."""
    grid = of[int(torch.randint(0, len(of), (1,), generator=generator))]
    clues = torch.full((CELLS,), MASK)
    kept = torch.randperm(CELLS, generator=generator)[:CLUES]
    clues[kept] = grid[kept]
    return Prompt(" ".join(map(str, clues.tolist())), {})


class Perceptron(nn.Module):
    """Logits of the empty cells of a puzzle, in order, from its clues and what is filled in so far."""

    def __init__(self) -> None:
        super().__init__()
        wide = nn.Linear(CELLS * (DIGITS + 1), 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU()
        self.body = nn.Sequential(*wide, nn.Linear(256, CELLS * DIGITS))

    def cells(self, grid: torch.Tensor) -> torch.Tensor:
        """(B, 16, 4) of grids (B, 16) with masks."""
        return self.body(functional.one_hot(grid, DIGITS + 1).float().flatten(1)).view(-1, CELLS, DIGITS)

    def forward(self, tokens, clues, read):
        empty = (clues == MASK).nonzero()[:, 1].view(-1, EMPTY)
        hidden = self.cells(clues.scatter(1, empty, tokens))
        return read(hidden.gather(1, empty[..., None].expand(-1, -1, DIGITS)), lambda logits: logits)


class Filler(TokenDouble):
    """A `TokenModel` whose samples are the empty cells of puzzles."""

    def __init__(self, seed: int, of: torch.Tensor) -> None:
        super().__init__(length=EMPTY, vocabulary=DIGITS, mask=MASK)
        torch.manual_seed(seed)
        self.network = Perceptron()
        optimizer = torch.optim.Adam(self.network.parameters(), 2e-3)
        for _ in range(500):
            grid = of[torch.randint(0, len(of), (256,))]
            grid = torch.where(torch.rand(grid.shape) < 0.35, torch.randint(0, DIGITS, grid.shape), grid)
            hidden = torch.rand(grid.shape) < torch.rand(256, 1)
            logits = self.network.cells(torch.where(hidden, MASK, grid))
            loss = functional.cross_entropy(logits[hidden], grid[hidden])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def encode(self, prompts):
        return Condition({"clues": torch.tensor([[int(cell) for cell in prompt.text.split()] for prompt in prompts])})

    def nothing(self):
        return Condition({"clues": torch.tensor([[0] * CLUES + [MASK] * EMPTY])})

    def call(self, tokens, condition, read):
        return self.network(tokens, condition.tensors["clues"], read)


class Rules:
    """Scores samples while others are drawn: the share of rows, columns and quarters that are right, and 1 for all."""

    def __init__(self, prompts: list[Prompt]) -> None:
        self.clues = torch.tensor([[int(cell) for cell in prompt.text.split()] for prompt in prompts])
        self.values = torch.zeros(len(prompts), 1, dtype=torch.float64)

    def right(self, rows, tokens) -> torch.Tensor:
        grid = self.clues[rows].clone()
        grid[grid == MASK] = tokens.flatten()
        return (functional.one_hot(grid[:, UNITS], DIGITS).sum(dim=2) == 1).all(dim=-1)

    def add(self, rows, tokens):
        right = self.right(rows, tokens)
        self.values[rows, 0] = right.double().mean(dim=1) + right.all(dim=1).double()

    def table(self):
        return RewardTable(("rules",), self.values, torch.ones(1, dtype=torch.float64))


def right_after(state: str, seed: int, updates: int) -> tuple[float, float]:
    """The share of rows, columns and quarters that are right, before training and after it."""
    rollout, sampling = MaskedRollout(num_steps=EMPTY, micro_batch=128), MaskedSampling(num_steps=EMPTY)
    score = UnmaskedSteps(3, state=state)
    of = grids()
    process = MaskedProcess(Filler(seed, of), Unmasking(), score, rollout, sampling, 384, WORLD)
    config = OptimConfig(lr=1e-3, weight_decay=0.0, max_grad_norm=1.0)
    optimizer = Optimizer(dict(process.network.named_parameters()), config, WORLD)
    before, draws = share_right(process, of), torch.Generator().manual_seed(seed)
    for update in range(updates):
        prompts = [puzzle(draws, of) for _ in range(16)]
        groups = [PromptGroup(update, number, prompt, 8) for number, prompt in enumerate(prompts)]
        scoring = Rules([prompt for prompt in prompts for _ in range(8)])
        drawn = draw_and_score(process, scoring, groups, seed, WORLD, lambda phase: nullcontext(), 1)
        record = compare(drawn, process.channels, Credit(std="none", combine="raw"), WORLD).record
        policy_update(process, Clipped(clip_range=0.2), optimizer, record, config, WORLD)
    return before, share_right(process, of)


def share_right(process: MaskedProcess, of: torch.Tensor) -> float:
    draws = torch.Generator().manual_seed(7)
    prompts = [puzzle(draws, of) for _ in range(512)]
    tokens = process.sample(prompts, [(0, "evaluation", row) for row in range(512)], lambda rows, drawn: None)
    return float(Rules(prompts).right(torch.arange(512), tokens).double().mean())


@pytest.mark.usefixtures("unchecked")
def test_exact_states_learn_more_than_masks_alone():
    before, exact = right_after("exact", seed=1, updates=600)
    _, masked = right_after("mean-field", seed=1, updates=600)
    assert exact > before + 0.07
    assert exact > masked + 0.07
