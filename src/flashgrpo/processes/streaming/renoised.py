"""A finished block that is noised again to one of the model's levels: DiffusionNFT (2509.16117) for streaming models.

Members differ as with `OneTransition`, by the noise of one level of one block. What is judged is the block that came of
it: noised again by noise of the member's own to a level that its group has drawn, in the clean context of the fork.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flashgrpo.process import Record
from flashgrpo.processes import renoise
from flashgrpo.processes.calls import fixed_batches
from flashgrpo.processes.settings import needs_old_velocity
from flashgrpo.processes.streaming.drawing import Stream
from flashgrpo.processes.streaming.model import StreamingModel
from flashgrpo.processes.streaming.settings import NoisedBlock, OneLevel, Transition
from flashgrpo.processes.streaming.source import Addend, Fork, StreamState, starts
from flashgrpo.processes.streaming.transition import OneTransition, Shared
from flashgrpo.seeds import keyed_bits, normal
from flashgrpo.types import Latents, Sample, to_device

VELOCITY = "velocity"
"""A column for this process alone, with a block for each unit: the velocities by the weights that draw."""


class RenoisedBlocks(OneTransition):
    """A unit is a member's block at one level; recorded are block and noise, and the old velocity where one is asked.

    "toward:b" and "away:b" are the errors of v+ and v- of DiffusionNFT at beta b, "kl", "kl_average" and "kl_old" mean
    squared distances of velocities. Without recorded velocities v is the old one, too.
    """

    def __init__(self, model: StreamingModel, explore: OneLevel, score: NoisedBlock, micro_batch: int) -> None:
        super().__init__(model, explore, Transition(rectified=False), micro_batch)
        self.noised = score

    def level(self, fork: Fork) -> int:
        """Return the level that the blocks of a group are noised to."""
        return keyed_bits("renoised level", *fork.group) % len(self.model.levels)

    def slot(self, fork: Fork) -> int:
        """Return a number of the block and the level."""
        return fork.frame * len(self.model.levels) + self.level(fork)

    def explore(
        self, prefix: Stream, fork: Fork, shared: Shared, samples: Sequence[Sample], rows: int
    ) -> tuple[Stream, Tensor]:
        """Draw the block's other levels for each member, and the noise that it is noised again by."""
        stream, _ = super().explore(prefix, fork, shared, samples, rows)
        block = stream.latents[:, :, -self.model.window.block :]
        names = [(fork.group[0], "renoised", *sample.name) for sample in samples]
        names += names[-1:] * (rows - len(names))
        noise = torch.stack([normal(tuple(block.shape[1:]), *name) for name in names])
        return stream, torch.stack([block, to_device(noise, block.device).to(block.dtype)], dim=1)

    def keeps(self, columns: Sequence[str]) -> str | None:
        """Return the velocities where a column compares with them."""
        return VELOCITY if needs_old_velocity(columns) else None

    def with_kept(self, record: Record, kept: Tensor | None) -> Record:
        """Return a record with the velocities by the weights that drew."""
        if kept is None:
            return record
        state: StreamState = record.state  # type: ignore[assignment]
        return replace(record, state=replace(state, recorded=torch.cat([state.recorded, kept.unsqueeze(1)], dim=1)))

    def replay(self, state: StreamState, columns: Sequence[str]) -> Iterator[Addend]:
        """Return minus the error of each unit's velocity; see `processes/renoise.py`."""
        ((rows, new),) = fixed_batches(len(state.fork), self.micro_batch)
        x0, eps = state.recorded[:, 0], state.recorded[:, 1]
        u, filled = eps - x0, state[rows]
        sigma = x0.new_full((new,), self.model.levels[self.level(state.of_units[0])])
        v = self._velocity(filled)[:new]
        old = state.recorded[:, 2] if state.recorded.shape[1] > 2 else v.detach()
        others = {"kl_old": old} if "kl_old" in columns else {}
        for name, weights in self.others(columns).items():
            with torch.no_grad(), weights():
                others[name] = self._velocity(filled)[:new]
        found = {name: renoise.distance(v, other) for name, other in others.items()}
        for beta in (name.removeprefix("toward:") for name in columns if name.startswith("toward:")):
            toward, away = renoise.contrast(self.noised.weight, sigma, v, old, u, float(beta))
            found |= {f"toward:{beta}": toward, f"away:{beta}": away}
        if VELOCITY in columns:
            found[VELOCITY] = v.detach()
        yield -renoise.error(self.noised.weight, sigma, v, u), found

    def _velocity(self, state: StreamState) -> Latents:
        forks = state.of_units
        cache, condition = starts(forks)
        frame, sigma = forks[0].frame, self.model.levels[self.level(forks[0])]
        x = (1 - sigma) * state.recorded[:, 0] + sigma * state.recorded[:, 1]
        return self.model.velocity(x, sigma, frame, cache.context(self.model.window.past(frame)), condition)
