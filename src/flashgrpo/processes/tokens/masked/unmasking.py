"""The only unmasking loop: samples of masks, which get some of their tokens at each step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from flashgrpo.processes.choices import Kept, entropy, gumbel, truncated
from flashgrpo.processes.tokens.masked.settings import Order, Plan
from flashgrpo.processes.tokens.model import Tokens
from flashgrpo.seeds import Name, generator
from flashgrpo.types import to_device

Logits = Callable[[Tokens, Int64[Tensor, "batch places"]], Float32[Tensor, "batch places vocabulary"]]
"""Of the places asked for, given all tokens; the mask has none."""
NEVER = 1_000_000
"""The step of a token that no step has drawn: the filler of a text that has ended."""


@dataclass(frozen=True)
class Unmasked:
    """Samples as they were drawn, B of them: enough to rebuild what every step of each has seen.

    Args:
        tokens: (B, L) on the device.
        step: (B, L) that drew each token, on the CPU; `NEVER` of filler.
        steps: (B,) that drew something before the text had ended, on the CPU.
        kept: (B, L, K) candidates of each token, None where all are; on the device.
        entropy: (B, T) of the tokens that each step drew, in all, on the CPU.
    """

    tokens: Tokens
    step: Int64[Tensor, "batch tokens"]
    steps: Int64[Tensor, " batch"]
    kept: Kept | None
    entropy: Float64[Tensor, "batch steps"]

    def __getitem__(self, rows: slice) -> "Unmasked":
        """Return some of the samples."""
        kept = None if self.kept is None else self.kept[rows]
        return Unmasked(self.tokens[rows], self.step[rows], self.steps[rows], kept, self.entropy[rows])

    @staticmethod
    def stack(parts: Sequence["Unmasked"], length: int, num_steps: int, device: torch.device) -> "Unmasked":
        """Join samples of `length` tokens; none of them where there are no parts."""
        if not parts:
            none = torch.empty(0, dtype=torch.int64)
            tokens = none.view(0, length)
            return Unmasked(tokens.to(device), tokens, none, None, torch.empty(0, num_steps, dtype=torch.float64))
        kept = [part.kept for part in parts if part.kept is not None]
        return Unmasked(
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.step for part in parts]),
            torch.cat([part.steps for part in parts]),
            torch.cat(kept) if kept else None,
            torch.cat([part.entropy for part in parts]),
        )


@dataclass(frozen=True)
class Unmasking:
    """How samples are unmasked: see `settings.Unmasking`; a temperature of 0 takes the likeliest token of all.

    Args:
        mask, end: tokens that stand for one not drawn yet, and for the end of a text; a sample of whose block all
            tokens are `end` is filled up with it, and nothing more is drawn.
        measures: whether the entropy of what is drawn is wanted; it is 0 otherwise.
    """

    plan: Plan
    order: Order
    temperature: float
    top_k: int | None
    top_p: float
    mask: int
    end: int | None
    measures: bool = False

    @torch.no_grad()
    def draw(
        self,
        logits: Logits,
        names: Sequence[Name],
        length: int,
        device: torch.device,
        every_step: bool,
        watch: Callable[[int, Tokens], None] = lambda step, tokens: None,
    ) -> Unmasked:
        """Draw a sample for each name.

        Args:
            names: (seed, purpose, ...) of each sample's random numbers; those of a step have its number behind it.
            every_step: also make the calls of steps that have nothing left to draw, for ranks that call together.
            watch: told what each step sees.
        """
        rows = len(names)
        tokens = torch.full((rows, length), self.mask, device=device)
        step_of = torch.full_like(tokens, NEVER)
        ended = torch.zeros(rows, dtype=torch.bool, device=device)
        steps = torch.zeros(rows, dtype=torch.int64, device=device)
        kept: Tensor | None = None
        uncertain = torch.zeros(rows, self.plan.num_steps, device=device)
        for step in range(self.plan.num_steps):
            block, count = self.plan.at(step)
            watch(step, tokens)
            places = torch.arange(block.start, block.stop).expand(rows, -1)
            log_p, ids = self.candidates(logits(tokens, places))
            if ids is not None and kept is None:
                kept = torch.full((rows, length, ids.shape[-1]), -1, dtype=torch.int32, device=device)
            picked, chosen = self._choose(log_p, ids, tokens[:, block] == self.mask, count, names, step)
            chosen &= ~ended[:, None]
            tokens[:, block] = torch.where(chosen, picked, tokens[:, block])
            step_of[:, block] = torch.where(chosen, step, step_of[:, block])
            if kept is not None and ids is not None:
                kept[:, block] = torch.where(chosen[..., None], ids, kept[:, block])
            if self.measures:
                uncertain[:, step] = (entropy(log_p) * chosen).sum(1)
            del log_p, ids  # not beside the next call's activations
            steps = torch.where(ended, steps, step + 1)
            if self.end is not None and (step + 1) % len(self.plan.counts) == 0:
                now = (tokens[:, block] == self.end).all(1) & ~ended
                tokens[:, block.stop :] = torch.where(now[:, None], self.end, tokens[:, block.stop :])
                ended |= now
                if not every_step and bool(ended.all()):
                    break
        return Unmasked(tokens, step_of.cpu(), steps.cpu(), kept, uncertain.double().cpu())

    def candidates(self, logits: Tensor) -> tuple[Tensor, Kept | None]:
        """Return the log-probabilities that are drawn from, and the ids of candidates; None where all are."""
        if self.temperature == 0:
            return logits.float().log_softmax(-1), None
        return truncated(logits, self.temperature, self.top_k, self.top_p)

    def _choose(
        self, log_p: Tensor, ids: Kept | None, masked: Tensor, count: int, names: Sequence[Name], step: int
    ) -> tuple[Tensor, Tensor]:
        """Draw a token at each place of a block; returns it, and whether it stays."""
        noisy = log_p
        if self.temperature:
            noise = gumbel(tuple(log_p.shape[1:]), [(*name, "token", step) for name in names])
            noisy = log_p + to_device(noise, log_p.device)
        place = noisy.argmax(-1)
        picked = place if ids is None else ids.gather(-1, place[..., None])[..., 0].long()
        if self.order == "random":
            drawn = [torch.rand(log_p.shape[1], generator=generator(*name, "place", step)) for name in names]
            first = to_device(torch.stack(drawn), log_p.device)
        elif self.order == "low-confidence":
            first = log_p.gather(-1, place[..., None])[..., 0]
        else:
            first = -entropy(log_p)
        best = first.masked_fill(~masked, -torch.inf).topk(count).indices
        return picked, torch.zeros_like(masked).scatter(1, best, True)
