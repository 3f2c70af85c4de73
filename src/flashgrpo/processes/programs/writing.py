"""The only sampler of completions: token by token with a cache, many calls at a time, each by its own numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from flashgrpo.processes.calls import fixed_batches
from flashgrpo.processes.choices import Kept, gumbel, truncated
from flashgrpo.processes.programs.model import LanguageModel
from flashgrpo.processes.programs.slots import Slots
from flashgrpo.seeds import Name
from flashgrpo.types import to_device


@dataclass(frozen=True)
class Written:
    """A completion: its tokens, the decoder's own log-probability of each, and the candidates; L places, on the CPU."""

    ids: tuple[int, ...]
    log_p: tuple[float, ...]
    kept: Kept | None


def placed(
    prompts: Sequence[Sequence[int]], places: int
) -> tuple[Int64[Tensor, "batch places"], Int64[Tensor, " batch"]]:
    """Put prompts on the right of so many places; returns ids, and how many each has."""
    ids = torch.tensor([[0] * (places - len(own)) + list(own) for own in prompts], dtype=torch.int64)
    return ids.view(-1, places), torch.tensor([len(own) for own in prompts], dtype=torch.int64)


@dataclass(frozen=True)
class CompletionSampler:
    """Draws completions.

    Args:
        slots: which calls may share a batch.
        temperature, top_k, top_p: see `ProgramRuns`; a temperature of 0 takes the likeliest token of all.
        size: rows of every call of the network.
        every_step: also make the calls of steps at which all rows have ended, for ranks that call together.
    """

    model: LanguageModel
    slots: Slots
    temperature: float
    top_k: int | None
    top_p: float
    size: int
    every_step: bool = False

    def batches(self, slots: Sequence[int]) -> dict[int, list[int]]:
        """Sort calls by their slots; what is in one batch has one width, and one set of adapters."""
        found: dict[int, list[int]] = {}
        for number, slot in enumerate(slots):
            found.setdefault(slot, []).append(number)
        return dict(sorted(found.items()))

    @torch.no_grad()
    def write(self, prompts: Sequence[Sequence[int]], names: Sequence[Name], slots: Sequence[int]) -> list[Written]:
        """Draw a completion to each prompt; what else is asked for at the same time changes no bit of it."""
        found: dict[int, Written] = {}
        for slot, numbers in self.batches(slots).items():
            for rows, new in fixed_batches(len(numbers), self.size):
                own = [numbers[row] for row in rows.tolist()]
                written = self._batch([prompts[number] for number in own], [names[number] for number in own], slot)
                found |= dict(zip(own[:new], written, strict=False))
        return [found[number] for number in range(len(prompts))]

    def _batch(self, prompts: Sequence[Sequence[int]], names: Sequence[Name], slot: int) -> list[Written]:
        adapters, places = self.slots.split(slot)
        self.model.use(adapters)
        device = self.model.device
        ids, count = placed(prompts, places)
        logits, cache = self.model.begin(to_device(ids, device), to_device(count, device))
        steps: list[tuple[Tensor, Tensor, Kept | None]] = []
        ended = torch.zeros(len(prompts), dtype=torch.bool)
        for step in range(self.model.length):
            token, log_p, kept = self._draw(logits, [(*name, "token", step) for name in names])
            steps.append((token.cpu(), log_p.cpu(), None if kept is None else kept.cpu()))
            ended |= torch.tensor([int(one) in self.model.ends for one in steps[-1][0]])
            if step + 1 == self.model.length or (bool(ended.all()) and not self.every_step):
                break
            logits = self.model.go_on(token, cache)
        return [self._written(steps, row) for row in range(len(prompts))]

    def _draw(self, logits: Tensor, names: Sequence[Name]) -> tuple[Tensor, Tensor, Kept | None]:
        """Draw a token for each row; returns it, its log-probability, and its candidates."""
        greedy = self.temperature == 0
        log_p, kept = truncated(logits, *((1.0, None, 1.0) if greedy else (self.temperature, self.top_k, self.top_p)))
        noisy = log_p if greedy else log_p + to_device(gumbel((log_p.shape[-1],), names), log_p.device)
        place = noisy.argmax(-1, keepdim=True)
        token = place if kept is None else kept.gather(-1, place).long()
        return token[:, 0], log_p.gather(-1, place)[:, 0], kept

    def _written(self, steps: Sequence[tuple[Tensor, Tensor, Kept | None]], row: int) -> Written:
        ids = [int(token[row]) for token, _, _ in steps]
        last = next((place for place, token in enumerate(ids) if token in self.model.ends), len(ids) - 1)
        kept = [one[row] for _, _, one in steps[: last + 1] if one is not None]
        log_p = tuple(float(one[row]) for _, one, _ in steps[: last + 1])
        return Written(tuple(ids[: last + 1]), log_p, torch.stack(kept) if kept else None)

    def on_nothing(self) -> None:
        """Take part in the collectives of a batch."""
        self._batch([[0]], [(0, "nothing")], self.slots.first)
