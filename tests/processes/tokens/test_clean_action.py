"""What UDM-GRPO's paper finds: the finished sample as the action learns, what the sampler guessed at a step does not.

16 cells of 6 colours; a prompt says how many cells have colour 0. The policy is a perceptron that was trained to undo
noise without its prompt.
"""

from contextlib import nullcontext

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
from flashgrpo.processes.tokens.uniform.process import UniformTokensProcess
from flashgrpo.processes.tokens.uniform.settings import (
    Mixture,
    TokensAtTimes,
    UniformRollout,
    UniformSampling,
    UniformTokens,
)
from flashgrpo.types import Prompt, PromptGroup, RewardTable
from tests.tokens import WIDTH, TokenDouble

CELLS, COLOURS, COUNTS = 16, 6, range(2, 13)
PROMPTS = [Prompt(f"{count}", {"count": count}) for count in COUNTS]
WORLD = single_process()


class Perceptron(nn.Module):
    """Logits of all cells from all cells and the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(COLOURS, 8)
        wide = nn.Linear(8 * CELLS + WIDTH, 192), nn.SiLU(), nn.Linear(192, 192), nn.SiLU()
        self.body = nn.Sequential(*wide, nn.Linear(192, CELLS * COLOURS))

    def forward(self, tokens, text, read):
        seen = torch.cat([self.embedding(tokens).flatten(1), text], dim=1)
        return read(self.body(seen).view(-1, CELLS, COLOURS), lambda logits: logits)


class Cells(TokenDouble):
    """Trained on cells of which a random share has colour 0, whatever the prompt says."""

    path, shift, codes = Mixture(), 1.0, None

    def __init__(self, seed: int) -> None:
        super().__init__(length=CELLS, vocabulary=COLOURS, mask=None)
        torch.manual_seed(seed)
        self.network = Perceptron()
        optimizer = torch.optim.Adam(self.network.parameters(), 2e-3)
        for _ in range(600):
            share = 0.1 + 0.8 * torch.rand(256, 1)
            clean = torch.where(torch.rand(256, CELLS) < share, 0, torch.randint(1, COLOURS, (256, CELLS)))
            kept = torch.rand(256, CELLS) < torch.rand(256, 1)
            noisy = torch.where(kept, clean, torch.randint(0, COLOURS, clean.shape))
            logits = self.network(noisy, torch.randn(256, WIDTH), lambda hidden, head: hidden)
            loss = functional.cross_entropy(logits.flatten(0, 1), clean.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


class Counting:
    """Scores samples while others are drawn: 1 for the right count, less a sixteenth for each cell too many or few."""

    def __init__(self, counts: list[int]) -> None:
        self.counts, self.values = torch.tensor(counts), torch.zeros(len(counts), 1, dtype=torch.float64)

    def add(self, rows, tokens):
        off = ((tokens == 0).sum(dim=1) - self.counts[rows]).abs()
        self.values[rows, 0] = (off == 0).double() - off / CELLS

    def table(self):
        return RewardTable(("count",), self.values, torch.ones(1, dtype=torch.float64))


def hits_after(score: TokensAtTimes, seed: int, updates: int = 160) -> tuple[float, float]:
    """The share of samples with the right count, before training and after it."""
    rollout, sampling = UniformRollout(num_steps=8, micro_batch=128), UniformSampling(num_steps=8)
    process = UniformTokensProcess(Cells(seed), UniformTokens(), score, rollout, sampling, 128, WORLD)
    config = OptimConfig(lr=1e-3, weight_decay=0.0, max_grad_norm=1.0)
    optimizer = Optimizer(dict(process.network.named_parameters()), config, WORLD)
    before = hits(process)
    draws = torch.Generator().manual_seed(seed)
    for update in range(updates):
        which = torch.randint(0, len(PROMPTS), (16,), generator=draws).tolist()
        groups = [PromptGroup(update, number, PROMPTS[prompt], 8) for number, prompt in enumerate(which)]
        scoring = Counting([COUNTS[prompt] for prompt in which for _ in range(8)])
        drawn = draw_and_score(process, scoring, groups, seed, WORLD, lambda phase: nullcontext(), 1)
        record = compare(drawn, process.channels, Credit(), WORLD).record
        policy_update(process, Clipped(clip_range=1e-4), optimizer, record, config, WORLD)
    return before, hits(process)


def hits(process: UniformTokensProcess) -> float:
    prompts = [prompt for prompt in PROMPTS for _ in range(64)]
    names = [(0, "evaluation", number) for number in range(len(prompts))]
    tokens = process.sample(prompts, names, lambda rows, drawn: None)
    wanted = torch.tensor([prompt.columns["count"] for prompt in prompts])
    return float(((tokens == 0).sum(dim=1) == wanted).double().mean())


@pytest.mark.usefixtures("unchecked")
def test_the_clean_action_learns_and_the_naive_one_hardly_does():
    before, clean = hits_after(TokensAtTimes(), seed=1)
    _, naive = hits_after(TokensAtTimes(state="sampler", action="guess"), seed=1)
    assert clean > before + 0.07
    assert clean > naive + 0.07
