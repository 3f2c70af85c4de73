"""A streaming process that fits on a page: branches, contexts, and scores of several addends that compete.

`Stream` draws a video block by block, each from the context that the blocks before it leave. The branches of a prompt
share all of their noise, and differ by what they see of the context from a fork on. A branch is scored in the clean
context, by how far the network's own predictions there are from those of the branch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashgrpo.process import Cost, Record
from flashgrpo.seeds import keyed_bits, normal
from flashgrpo.types import index_rows, to_device
from tests.fakes import WIDTH, Fake, whole_score

SIZE = 4  # numbers of a block, and of a context
BLOCKS, ROUTED = 5, 2  # of a video; that a branch draws in another context
SIGMAS = (1.0, 0.5)  # noise levels of a block; a gradient goes through the first alone


@dataclass(frozen=True)
class Branches:
    """Keep what `Stream` needs to score U branches again.

    Args:
        x, predicted: (U, BLOCKS, levels, SIZE) what the network was given, and what it said in the branch's context.
        text, context: (U, WIDTH) and (U, SIZE), at the fork.
    """

    x: Tensor
    predicted: Tensor
    text: Tensor
    context: Tensor

    def __getitem__(self, units: Tensor) -> "Branches":
        return Branches(*(index_rows(rows, units) for rows in (self.x, self.predicted, self.text, self.context)))


class Stream(Fake):
    """A unit is a branch with one term, its slot is the fork: replays of one slot make equally many calls.

    Args:
        anchored: whether each group has a sample that sees the context as it is; `cost` counts it.
    """

    addends = (BLOCKS - 1) * len(SIGMAS)

    def __init__(self, anchored=False, **settings):
        super().__init__(inputs=WIDTH + 2 * SIZE, outputs=SIZE, **settings)
        self.anchored = anchored
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.network.append(torch.nn.Tanh())
            self.network.append(torch.nn.Linear(SIZE, SIZE))
        self.network.to(self.device)
        self._base = {name: weight.detach().clone() for name, weight in self.network.named_parameters()}

    # ---- drawing

    @torch.no_grad()
    def draw(self, samples, seed, on_drawn, uses=1, columns=()):
        forks = torch.tensor([fork(seed, *sample.name[:2]) for sample in samples], dtype=torch.int64)
        names = [(seed, *sample.name[:2]) for sample in samples]
        routes = [
            torch.zeros(SIZE) if sample.is_anchor else normal((SIZE,), seed, "route", *sample.name)
            for sample in samples
        ]
        outputs, state = self._stream([s.group.prompt for s in samples], names, forks.tolist(), routes)
        on_drawn(torch.arange(len(samples)), outputs)
        member = torch.tensor([row for row, sample in enumerate(samples) if not sample.is_anchor], dtype=torch.int64)
        group = torch.tensor([sample.group.group for sample in samples], dtype=torch.int64)[member]
        unit, weight = torch.arange(len(member)), torch.ones(len(member), device=self.device)
        record = Record(forks[member], unit, member, group, 0 * unit, weight, None, state[member])
        return outputs, replace(record, old=self._scores(record))

    def _stream(self, prompts, names, forks, routes) -> tuple[Tensor, Branches]:
        """Draw videos, (B, 3), and what a replay needs of each, from the noise of its name."""
        text = self.encode(prompts).tensors["text"]
        shape = (len(names), BLOCKS, len(SIGMAS), SIZE)
        x, predicted = (torch.zeros(shape, device=self.device) for _ in range(2))
        noise = torch.stack([torch.zeros(shape[1:]), *(normal(shape[1:], "noise", *name) for name in names)])[1:]
        noise, context = to_device(noise, self.device), torch.zeros(len(names), SIZE, device=self.device)
        at_fork, total = context.clone(), context.clone()
        for block in range(BLOCKS):
            seen = context.clone()
            for row, first in enumerate(forks):
                at_fork[row] = context[row] if block == first else at_fork[row]
                if first <= block < first + ROUTED:
                    seen[row] += to_device(routes[row], self.device)
            for level, sigma in enumerate(SIGMAS):
                clean = predicted[:, block, level - 1] if level else 0.0
                x[:, block, level] = (1 - sigma) * clean + sigma * noise[:, block, level]
                predicted[:, block, level] = self.exact(torch.cat([text, seen, x[:, block, level]], dim=1))
            context, total = left(context, predicted[:, block, -1]), total + predicted[:, block, -1]
        return total[:, :3].sigmoid(), Branches(x, predicted, text, at_fork)

    def _scores(self, record: Record) -> Tensor:
        """Score what was drawn as a replay does, without gradient, as the first of two passes has none."""
        scores = torch.empty(len(record), device=self.device)
        for slot in record.slot.unique():
            for units in (record.slot == slot).nonzero().flatten().split(self.micro_batch):
                scores[units] = whole_score(self, record[units])
        return scores

    # ---- scoring again

    def micro_batches(self, record):
        return [record[units] for units in torch.arange(len(record)).split(self.micro_batch) if len(units)]

    def replay(self, record, columns):
        scores = self._energies(record)
        if "score_base" not in columns:
            yield from ((score, {}) for score in scores)
            return
        base = self._energies(record)
        for score in scores:
            with torch.no_grad(), self.reference():
                by_base = next(base)
            yield score, {"score_base": by_base}

    def _energies(self, record: Record) -> Iterator[Tensor]:
        """Hand out the score of each call, which the weights of the moment compute in a context of their own."""
        state: Branches = record.state
        context = state.context
        for block in range(int(record.slot[0]), BLOCKS):
            for level in range(len(SIGMAS)):
                x = torch.cat([state.text, context, state.x[:, block, level]], dim=1)
                with torch.set_grad_enabled(torch.is_grad_enabled() and level == 0):
                    predicted = self.exact(x)
                    score = -sum((state.predicted[:, block, level] - predicted).square().unbind(1)) / (2 * SIZE)
                yield score
            context = left(context, predicted.detach())

    def idle(self, slot, columns):
        """Make the calls of a replay of the slot."""
        for _ in range(slot, BLOCKS):
            for level in range(len(SIGMAS)):
                with torch.set_grad_enabled(torch.is_grad_enabled() and level == 0):
                    yield from super().idle(slot, columns)
                if "score_base" in columns:
                    with torch.no_grad(), self.reference():
                        super().idle(slot, columns)

    @torch.no_grad()
    def sample(self, prompts, names, on_drawn, num_steps=None):
        outputs, _ = self._stream(prompts, names, [BLOCKS] * len(names), [torch.zeros(SIZE)] * len(names))
        on_drawn(torch.arange(len(prompts)), outputs)
        return outputs

    def cost(self, seed, update, passes, columns, uses=1):
        """Count two replays of each branch, the first without gradient, and by both weights where a column asks."""
        samples = self.prompts * self.group_size
        scored = sum(BLOCKS - fork(seed, update, group) for group in range(self.prompts)) * self.group_size
        forwards = scored * len(SIGMAS)
        replays = forwards * (1 + ("score_base" in columns)) + forwards + 2 * scored
        drawn = samples + self.prompts * self.anchored
        return Cost(drawn * BLOCKS * len(SIGMAS) + forwards, replays * passes)


def fork(seed: int, update: int, group: int) -> int:
    """Return the block at which the branches of a group part."""
    return 1 + keyed_bits("fork", seed, update, group) % 2


def left(context: Tensor, block: Tensor) -> Tensor:
    """Return the context that a block leaves."""
    return 0.5 * context + 0.5 * block
