"""The whole loop on processes that fit on a page: the reward rises, and nothing in the loop asks what was drawn."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from flashgrpo.distributed.world import single_process
from flashgrpo.learning.experience import compare, draw_and_score
from flashgrpo.learning.objective import Clipped, Competing
from flashgrpo.learning.optim import Optimizer
from flashgrpo.learning.settings import Credit, OptimConfig
from flashgrpo.learning.update import policy_update
from flashgrpo.models.lora import trained_parameters
from flashgrpo.run import checkpoint
from flashgrpo.run.checkpoint import Progress
from flashgrpo.run.writer import Writer
from flashgrpo.types import Prompt, PromptGroup, RewardTable
from tests.fakes import Colour, Program
from tests.streams import Stream, number_of

WORLD = single_process()
TARGETS = {"red": 0, "green": 1, "blue": 2}
PROMPTS = [Prompt(text, {}) for text in TARGETS]
SIZE = 8


class Matches:
    """Scores for every channel: how much of the prompt's colour there is."""

    def __init__(self, process, prompts):
        self.process, self.prompts = process, prompts
        self.values = torch.zeros(len(prompts), dtype=torch.float64)

    def add(self, rows, outputs):
        videos = self.process.media(outputs, 1)
        for row, video in zip(rows.tolist(), videos, strict=True):
            target = TARGETS[self.prompts[row].text]
            self.values[row] = video[:, target].mean() - video[:, [c for c in range(3) if c != target]].mean()

    def table(self):
        names = tuple(self.process.channels)
        values = self.values[:, None].expand(-1, len(names)).contiguous()
        return RewardTable(names, values, torch.ones(len(names), dtype=torch.float64), channels=names)


def one_update(process, optimizer, update, config, objective):
    groups = [PromptGroup(update, number, prompt, SIZE) for number, prompt in enumerate(PROMPTS)]
    scores = Matches(process, [group.prompt for group in groups for _ in range(SIZE)])
    uses = config.passes * config.minibatches
    drawn = draw_and_score(process, scores, groups, 0, WORLD, lambda phase: nullcontext(), uses)
    record = compare(drawn, process.channels, Credit(), WORLD).record
    return float(drawn.rewards.total.mean()), policy_update(process, objective, optimizer, record, config, WORLD)


def made(kind, config):
    process = kind(micro_batch=8, prompts=len(PROMPTS), group_size=SIZE)
    return process, Optimizer(trained_parameters(process.network), config, WORLD)


@pytest.mark.parametrize("kind", [Colour, Program])
@pytest.mark.parametrize("settings", [{}, {"passes": 2, "minibatches": 2}])
def test_the_reward_rises(kind, settings):
    config = OptimConfig(lr=0.05, ema={"every": 1}, **settings)
    process, optimizer = made(kind, config)
    lines = [one_update(process, optimizer, update, config, Clipped(clip_range=0.2)) for update in range(30)]
    assert all(metrics["drift"] == 0 for _, metrics in lines)
    first, last = (sum(reward for reward, _ in part) / 5 for part in (lines[:5], lines[-5:]))
    assert last > first + 0.3


@pytest.mark.parametrize("kind", [Colour, Program])
def test_a_penalty_keeps_the_policy_near_the_base(kind):
    distances = []
    for kl_coef in (1e-9, 1.0):
        config = OptimConfig(lr=0.05)
        process, optimizer = made(kind, config)
        objective = replace(Clipped(clip_range=0.2), kl_coef=kl_coef)
        lines = [one_update(process, optimizer, update, config, objective)[1] for update in range(15)]
        assert lines[0]["kl"] == 0
        distances.append(lines[-1]["kl"])
    assert distances[1] < distances[0] / 2


@pytest.mark.parametrize("kind", [Colour, Program])
def test_a_resumed_run_ends_with_the_same_bits(kind, tmp_path):
    config, objective = OptimConfig(lr=0.05), Clipped(clip_range=0.2)
    process, optimizer = made(kind, config)
    for update in range(2):
        one_update(process, optimizer, update, config, objective)
    writer = Writer(tmp_path, 2, WORLD)
    writer.save(optimizer.state(), Progress(2))
    one_update(process, optimizer, 2, config, objective)
    writer.wait()

    other, resumed = made(kind, config)
    state = resumed.state()
    checkpoint.read_into(tmp_path, 2, state, WORLD)
    resumed.restored(state)
    one_update(other, resumed, 2, config, objective)
    for name, weight in optimizer.weights().items():
        assert torch.equal(resumed.weights()[name], weight)


class Redness:
    """Scores how red a sample is, or how little."""

    def __init__(self, sign, count):
        self.sign, self.values = sign, torch.zeros(count, 1, dtype=torch.float64)

    def add(self, rows, outputs):
        self.values[rows] = self.sign * number_of(outputs).double().cpu()

    def table(self):
        return RewardTable(("red",), self.values, torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("credit", [Credit(), Credit(baseline="anchor", std="group-and-anchor", clip=2.5)])
def test_branches_that_compete_teach_what_is_drawn_without_them(sign, credit):
    """The model as it is, in a clean context, follows the branches that were better, whichever way that is."""
    config, objective = OptimConfig(lr=0.01), Competing(tau=0.05, kl_coef=0.01)
    process = Stream(credit.anchored, micro_batch=8, prompts=len(PROMPTS), group_size=SIZE)
    optimizer = Optimizer(trained_parameters(process.network), config, WORLD)
    reds = []
    for update in range(15):
        groups = [PromptGroup(update, n, prompt, SIZE, credit.anchored) for n, prompt in enumerate(PROMPTS)]
        scores = Redness(sign, sum(len(group.samples) for group in groups))
        drawn = draw_and_score(process, scores, groups, 0, WORLD, lambda phase: nullcontext(), 1)
        metrics = policy_update(
            process, objective, optimizer, compare(drawn, process.channels, credit, WORLD).record, config, WORLD
        )
        assert metrics["drift"] == 0
        clean = process.sample(PROMPTS * 4, [("clean", n) for n in range(4 * len(PROMPTS))], lambda rows, outputs: None)
        reds.append(float(number_of(clean).mean()))
    assert sign * (reds[-1] - reds[0]) > 0.2
    assert 1 / SIZE < metrics["largest_share"] < 0.9
    assert metrics["kl"] > 0
