"""Branches that see other old frames, and how near the network's own predictions are to them (KVPO, arXiv 2605.14278).

    s = - sum over blocks b and levels l of mean (x0_hat_branch - x0_hat)^2 / (2 max(sigma_l, floor)^2)

x0_hat_branch is what the network predicted in the branch's context, x0_hat what it predicts from the same noisy input
in the clean one: that of the fork, and behind it its own last predictions. The un-routed branch has exactly 0.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flashgrpo.errors import UserError
from flashgrpo.processes.calls import fixed_batches
from flashgrpo.processes.streaming.drawing import Script, Stream, block_noise
from flashgrpo.processes.streaming.levels import next_input
from flashgrpo.processes.streaming.model import StreamingModel
from flashgrpo.processes.streaming.settings import Energy, Routing
from flashgrpo.processes.streaming.source import Addend, Fork, Source, StreamState, starts
from flashgrpo.seeds import keyed_bits
from flashgrpo.types import Sample, index_rows, to_device


class RoutedBranches(Source):
    """A unit is a branch with one term; its slot is the fork's frame. A replay's addends are its levels, in order."""

    def __init__(self, model: StreamingModel, explore: Routing, score: Energy, micro_batch: int) -> None:
        super().__init__(model, micro_batch)
        self.routing, self.score = explore, score
        self.addends = explore.blocks * len(model.levels)
        channels, _, height, width = model.latent_shape
        block = channels, model.window.block, height, width
        self.recorded_shape = (explore.blocks, len(model.levels), *block)

    def forks(self, script: Script) -> list[tuple[int, int]]:
        """Return the frames that have room for all routed blocks in one scene."""
        routing, window = self.routing, self.model.window
        length = routing.blocks * window.block
        every = routing.forks(self.model.latent_shape[1], window)
        found = [f for f in every if not any(f < start < f + length for start in script.starts)]
        if not found:
            raise UserError(
                f"algorithm.explore.blocks: {routing.blocks} routed blocks have no room between the switches of a "
                f"prompt, whose scenes begin at latent frames {list(script.starts)}; lower it, or move the switches"
            )
        return [(frame, 0) for frame in found]

    def slot(self, fork: Fork) -> int:
        """Return the fork's frame."""
        return fork.frame

    def routes(self, fork: Fork, samples: Sequence[Sample]) -> list[list[int]]:
        """Return the old frames that each branch is shown."""
        routing, pool = self.routing, self.routing.pool(fork.frame, self.model.window)

        def dealt(*name: int) -> list[int]:
            return sorted(pool, key=lambda frame: keyed_bits("route", *fork.group, *name, frame))

        if routing.plan == "independent":
            return [dealt(sample.member)[: routing.routed] for sample in samples]
        order = dealt()
        first = [sample.member * len(order) // sample.group.size for sample in samples]
        return [[order[(start + i) % len(order)] for i in range(routing.routed)] for start in first]

    def explore(
        self, prefix: Stream, fork: Fork, shared: None, samples: Sequence[Sample], rows: int
    ) -> tuple[Stream, Tensor]:
        """Draw the routed blocks of branches, each in its own context, from the noise that they share."""
        routes = self.routes(fork, samples)
        routes += routes[-1:] * (rows - len(routes))
        stream, drawn = prefix.repeated(rows), []
        for _ in range(self.routing.blocks):
            window = self.model.window
            frames = [window.routed(stream.frame, route, self.routing.nearest) for route in routes]
            context = stream.cache.contexts(frames)
            _, predictions = stream.levels(context, stream.noise([fork.shared]))
            drawn.append(torch.stack(predictions, dim=1))
            stream = stream.followed_by(predictions[-1], context)
        return stream, torch.stack(drawn, dim=1)

    def replay(self, state: StreamState, columns: Sequence[str]) -> Iterator[Addend]:
        """Hand out the part of each level, by the weights of the moment and by those that columns compare with."""
        ((rows, new),) = fixed_batches(len(state.fork), self.micro_batch)
        filled = state[rows]
        others = self.others(columns)
        walks = {name: self._energies(filled) for name in others}
        for score in self._energies(filled):
            found = {}
            for name, weights in others.items():
                with torch.no_grad(), weights():
                    found[name] = next(walks[name])[:new]
            yield score[:new], found

    def _energies(self, state: StreamState) -> Iterator[Tensor]:
        """Hand out minus the energy of each level; each of the blocks begins in the context that those before left."""
        forks = state.of_units
        cache, condition = starts(forks)
        window, levels, frame = self.model.window, self.model.levels, forks[0].frame
        for block in range(self.routing.blocks):
            context, inputs = cache.context(window.past(frame)), self._inputs(state, forks, block)
            for level, (x, sigma) in enumerate(zip(inputs, levels, strict=True)):
                graded = torch.is_grad_enabled() and level < self.score.trained_levels
                with torch.set_grad_enabled(graded):
                    predicted = x - sigma * self.model.velocity(x, sigma, frame, context, condition)
                    scale = 2 * (sigma if self.score.space == "velocity" else 1.0) ** 2
                    difference = state.recorded[:, block, level] - predicted
                    energy = difference.square().flatten(1).mean(dim=1) / scale
                yield -energy
            if block + 1 < self.routing.blocks:
                cache = self.model.commit(cache, predicted.detach(), context, condition)
            frame += window.block

    def _inputs(self, state: StreamState, forks: Sequence[Fork], block: int) -> list[Tensor]:
        """Return the noisy input of each level of a block, made again from names and recorded predictions."""
        frame, levels = forks[0].frame + block * self.model.window.block, self.model.levels
        numbers, of = state.fork.unique(return_inverse=True)
        names = [state.forks[number].shared for number in numbers.tolist()]
        inputs: list[Tensor] = []
        for level, sigma in enumerate(levels):
            noise = block_noise(self.model, names, frame, level)
            if noise is not None:
                noise = index_rows(to_device(noise, state.recorded.device), of).to(state.recorded.dtype)
            if inputs:
                before = state.recorded[:, block, level - 1]
                inputs.append(next_input(inputs[-1], before, levels[level - 1], sigma, noise))
            elif noise is not None:
                inputs.append(noise)
        return inputs

    def idle(self, slot: int, columns: Sequence[str]) -> Iterator[Tensor]:
        """Make the calls of a replay on a block of zeros."""
        x, condition, others = self.nothing(), self.model.nothing(), self.others(columns)
        levels = len(self.model.levels)
        for number in range(self.addends):
            commits = number > 0 and number % levels == 0  # of the block before
            self._call_more(commits)
            graded = torch.is_grad_enabled() and number % levels < self.score.trained_levels
            with torch.set_grad_enabled(graded):
                yield self.model.velocity(x, 1.0, 0, None, condition)
            for weights in others.values():
                with weights():
                    self._call_more(1 + commits)

    @torch.no_grad()
    def _call_more(self, times: int) -> None:
        self.call_on_nothing(times)
