"""The sampler of uniform tokens: random tokens that jump towards guesses of the network, step by step.

At each step the network guesses the clean tokens, one draw of each token's probabilities, and the tokens jump towards
the guess; at the last step they become it. All draws are named: three a step for each sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flashgrpo.distributed.world import World
from flashgrpo.process import OnDrawn
from flashgrpo.processes.calls import fixed_batches, missing_calls, number_of_calls
from flashgrpo.processes.tokens.chunks import by_chunks, categorical, chunks
from flashgrpo.processes.tokens.model import Head, Tokens
from flashgrpo.processes.tokens.uniform.model import UniformModel
from flashgrpo.processes.tokens.uniform.path import TokenPath, Uniform, jumped
from flashgrpo.processes.tokens.uniform.settings import Jumps
from flashgrpo.seeds import Name, generator
from flashgrpo.types import Condition, index_rows, to_device


@dataclass(frozen=True)
class Step:
    """A step of the sampler, of B samples: the tokens at its beginning, and the network's guess; (B, L)."""

    k: int
    x: Tokens
    guess: Tokens


@dataclass(frozen=True)
class Sampler:
    """Draws samples of a network along a path, `micro_batch` at a time whatever there is, so that equal names in give
    equal tokens out.
    """

    model: UniformModel
    path: TokenPath
    micro_batch: int
    world: World

    def walk(
        self,
        condition: Condition,
        names: Sequence[Name],
        times: Sequence[float],
        kind: Jumps,
        on_drawn: OnDrawn,
        keep: Callable[[Step], None] | None = None,
    ) -> Tokens:
        """Draw samples (B, L), one micro-batch after the other; all ranks make equally many calls of the network.

        Args:
            times: of the steps, and their end.
            keep: given every step of each micro-batch.
        """
        steps = len(times) - 1
        outputs = torch.empty(len(names), self.model.length, dtype=torch.int64, device=self.model.device)
        for rows, new in fixed_batches(len(names), self.micro_batch):
            own, of_rows = [names[row] for row in rows.tolist()], condition[rows]
            x = (self.numbers("start", own) * self.model.vocabulary).long()
            for k in range(steps):
                guess = self.guess(x, of_rows, self.numbers("guess", own, k))
                if keep is not None:
                    keep(Step(k, x[:new], guess[:new]))
                if k < steps - 1:
                    draws = self.numbers("jump", own, k), self.numbers("target", own, k)
                    guess = self.jump(x, guess, times[k], times[k + 1], kind, *draws)
                x = guess
            outputs.index_copy_(0, to_device(rows[:new], outputs.device), x[:new])
            on_drawn(rows[:new], x[:new])
        self.idle_calls(steps * number_of_calls(len(names), self.micro_batch))
        return outputs

    def guess(self, x: Tokens, condition: Condition, uniform: Uniform) -> Tokens:
        """Draw clean tokens by the network's probabilities."""
        return self.model.call(x, condition, partial(self._guesses, uniform))

    def _guesses(self, uniform: Uniform, hidden: Tensor, head: Head) -> Tensor:
        return by_chunks(hidden, head, self.model.vocabulary, partial(_guess, uniform))

    def jump(self, x: Tokens, guess: Tokens, t: float, s: float, kind: Jumps, whether: Uniform, to: Uniform) -> Tokens:
        """Draw the tokens at the end of a step from t to s, a few at a time; see `jumped`."""
        parts = [
            jumped(self.path, t, s, x[:, few], guess[:, few], kind, whether[:, few], to[:, few])
            for few in chunks(len(x), self.model.length, self.model.vocabulary)
        ]
        return torch.cat(parts, dim=1)

    def noised(self, t: Tensor, x1: Tokens, names: Sequence[Name]) -> Tokens:
        """Draw x_t ~ p_t(. | x1) of each row at its own time."""
        parts = [x1[:0]]
        for rows, new in fixed_batches(len(x1), self.micro_batch):
            clean, uniform = index_rows(x1, rows), self.numbers("noised", [names[row] for row in rows.tolist()])
            few = [
                categorical(self.path.probs(t[rows], clean[:, of]), uniform[:, of])
                for of in chunks(len(rows), self.model.length, self.model.vocabulary)
            ]
            parts.append(torch.cat(few, dim=1)[:new])
        return torch.cat(parts)

    def numbers(self, purpose: str, names: Sequence[Name], *step: int) -> Uniform:
        """Return numbers in [0, 1) by name, (B, L)."""
        length = self.model.length
        rows = [torch.rand(length, generator=generator(purpose, *name, *step), dtype=torch.float64) for name in names]
        return to_device(torch.stack(rows), self.model.device)

    def idle_calls(self, made: int) -> None:
        """Make as many calls as the rank that makes most, where ranks hold the network between them."""
        if self.world.uses_fsdp:
            x = torch.zeros(1, self.model.length, dtype=torch.int64, device=self.model.device)
            for _ in range(missing_calls(self.world, made)):
                self.guess(x, self.model.nothing(), x.double())


def _guess(uniform: Uniform, few: slice, logits: Tensor) -> Tensor:
    return categorical(logits.softmax(dim=-1), uniform[:, few])
