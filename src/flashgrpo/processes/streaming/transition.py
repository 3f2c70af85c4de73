"""The noise between two levels of one block, recorded as Flash-GRPO records a step of a walk (arXiv 2605.15980).

Between levels a prediction is noised again, x' = (1 - sigma') x0_hat + sigma' eps: a Gaussian, whose log-density by the
network is the score. All members of a group part at one level of one block, and share everything before and after.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flashgrpo.processes.calls import fixed_batches
from flashgrpo.processes.streaming.drawing import Noise, Script, Stream, block_noise
from flashgrpo.processes.streaming.model import StreamingModel
from flashgrpo.processes.streaming.settings import OneLevel, Transition
from flashgrpo.processes.streaming.source import Addend, Fork, Source, StreamState, own_name, starts
from flashgrpo.types import Latents, Sample, to_device

Shared = tuple[Noise, Latents, Latents]


class OneTransition(Source):
    """A unit is a member's transition; what is recorded of it is its input and its output, (2, C, block, H, W)."""

    def __init__(self, model: StreamingModel, explore: OneLevel, score: Transition, micro_batch: int) -> None:
        super().__init__(model, micro_batch)
        self.one, self.score = explore, score
        channels, _, height, width = model.latent_shape
        self.recorded_shape = (2, channels, model.window.block, height, width)

    def forks(self, script: Script) -> list[tuple[int, int]]:
        """Return every block from the earliest on, with each of its levels but the last."""
        return self.one.places(self.model.latent_shape[1], self.model.window, len(self.model.levels))

    def slot(self, fork: Fork) -> int:
        """Return a number of the block and the level."""
        return fork.frame * len(self.model.levels) + fork.level

    def weight(self, fork: Fork) -> float:
        """Return 1 over the size of the gradient by the velocity at the fork's level, relative to the mean."""
        if not self.score.rectified:
            return 1.0
        pairs = zip(self.model.levels, self.model.levels[1:], strict=False)
        inverse = [lower / (sigma * (1 - lower)) for sigma, lower in pairs]
        return inverse[fork.level] * len(inverse) / sum(inverse)

    def shared(self, prefix: Stream, fork: Fork) -> Shared:
        """Draw the levels before the transition; the noise of all levels, the input of the last, and its prediction."""
        noise = prefix.noise([fork.shared])
        inputs, predictions = prefix.levels(prefix.clean_context(), noise[: fork.level + 1], until=fork.level + 1)
        return noise, inputs[-1], predictions[-1]

    def explore(
        self, prefix: Stream, fork: Fork, shared: Shared, samples: Sequence[Sample], rows: int
    ) -> tuple[Stream, Tensor]:
        """Draw the block's other levels for each member."""
        common, before, predicted = shared
        seed, context = fork.group[0], prefix.clean_context()
        names = [own_name(seed, sample) for sample in samples]
        names += names[-1:] * (rows - len(names))
        noise = block_noise(self.model, names, fork.frame, fork.level + 1)
        assert noise is not None, "a model that draws along a straight line is refused"
        lower = self.model.levels[fork.level + 1]
        after = (1 - lower) * predicted + lower * to_device(noise, before.device)
        stream = prefix.repeated(rows)
        later = [eps if eps is None else eps.expand_as(after) for eps in common[fork.level + 2 :]]
        _, predictions = stream.levels(context, [after, *later], first=fork.level + 1)
        recorded = torch.stack([before.expand_as(after), after], dim=1)
        return stream.followed_by(predictions[-1], context), recorded

    def replay(self, state: StreamState, columns: Sequence[str]) -> Iterator[Addend]:
        """Return the log-density of each transition; "kl" is the divergence from that of the base model."""
        ((rows, new),) = fixed_batches(len(state.fork), self.micro_batch)
        filled = state[rows]
        lower = self.model.levels[filled.of_units[0].level + 1]
        mean = (1 - lower) * self._predicted(filled)
        after = filled.recorded[:, 1]
        score = -_mean_square(after - mean)[:new] / (2 * lower**2)
        found = {}
        for name, weights in self.others(columns).items():
            with torch.no_grad(), weights():
                other = (1 - lower) * self._predicted(filled)
            found[name] = _mean_square(mean - other)[:new] / (2 * lower**2)
        yield score, found

    def _predicted(self, state: StreamState) -> Latents:
        forks = state.of_units
        cache, condition = starts(forks)
        frame, sigma = forks[0].frame, self.model.levels[forks[0].level]
        x, context = state.recorded[:, 0], cache.context(self.model.window.past(frame))
        return x - sigma * self.model.velocity(x, sigma, frame, context, condition)

    def idle(self, slot: int, columns: Sequence[str]) -> Iterator[Tensor]:
        """Make the calls of a replay on a block of zeros."""
        x, condition = self.nothing(), self.model.nothing()
        yield self.model.velocity(x, 1.0, 0, None, condition)
        for weights in self.others(columns).values():
            with torch.no_grad(), weights():
                self.model.velocity(x, 1.0, 0, None, condition)


def _mean_square(values: Tensor) -> Tensor:
    return values.square().flatten(1).mean(dim=1)
