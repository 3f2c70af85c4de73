"""The samples of an update: of each prompt group a prefix once, then its branches, and its anchor."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from flashgrpo.distributed.world import World
from flashgrpo.process import OnDrawn
from flashgrpo.processes.calls import fixed_batches, missing_calls, number_of_calls
from flashgrpo.processes.streaming.cost import drawn_until, place_of
from flashgrpo.processes.streaming.drawing import Script, Stream, renewed_blocks
from flashgrpo.processes.streaming.model import StreamingModel
from flashgrpo.processes.streaming.settings import StreamExplore
from flashgrpo.processes.streaming.source import Fork, Source, StreamState, shared_name
from flashgrpo.types import Latents, Prompt, PromptGroup, Sample


@dataclass(frozen=True)
class Groups:
    """Draws the samples of prompt groups.

    Args:
        rows: branches drawn at once, at most.
        whole: whether videos are drawn to their end, and not only as far as the blocks in which branches differ.
        seed: of the run.
    """

    model: StreamingModel
    source: Source
    explore: StreamExplore
    rows: int
    whole: bool
    world: World
    seed: int

    def draw(
        self, samples: Sequence[Sample], script_of: Callable[[Prompt], Script], on_drawn: OnDrawn
    ) -> tuple[Latents, StreamState, list[int]]:
        """Draw this rank's samples; the latents of all, what replay needs of the branches, and the branches' rows.

        Latents that are not drawn are 0.
        """
        device = self.model.device
        outputs = torch.zeros(len(samples), *self.model.latent_shape, device=device)
        recorded, branches = [torch.empty(0, *self.source.recorded_shape, device=device)], list[int]()
        forks, of = list[Fork](), list[int]()
        groups = [list(rows) for _, rows in groupby(range(len(samples)), key=lambda row: samples[row].name[:2])]
        scripts = [script_of(samples[rows[0]].group.prompt) for rows in groups]
        each = list(zip(groups, scripts, strict=True))
        missing = missing_calls(self.world, sum(self._calls([samples[row] for row in r], s) for r, s in each))
        for rows, script in each:
            prefix, fork = self._forked(samples[rows[0]].group, script)
            members = [row for row in rows if not samples[row].is_anchor]
            for part, kept, stream in self._branches(prefix, fork, members, samples):
                outputs[part, :, : stream.end] = stream.latents
                recorded.append(kept)
            for row in set(rows) - set(members):
                outputs[row, :, : prefix.end] = prefix.until(prefix.end, [fork.shared]).latents[0]
            branches += members
            of += [len(forks)] * len(members)
            forks.append(fork)
            on_drawn(torch.tensor(rows), outputs[rows])  # together, since they are decoded as far as they differ
        self.source.call_on_nothing(missing)
        return outputs, StreamState(torch.tensor(of, dtype=torch.int64), forks, torch.cat(recorded)), branches

    def _forked(self, group: PromptGroup, script: Script) -> tuple[Stream, Fork]:
        """Draw what the samples of a group have in common."""
        name = self.seed, group.update, group.group
        frame, level = place_of(self.source.forks(script), *name)
        stream = Stream.begun(self.model, script, 1, self.explore.remembered, self._end(frame))
        stream = stream.until(frame, [shared_name(*name)]).at_its_prompt()
        cache = stream.cache.only(self.model.window.past(frame))
        return stream, Fork(name, frame, level, cache, script.at(frame))

    def _branches(
        self, prefix: Stream, fork: Fork, rows: Sequence[int], samples: Sequence[Sample]
    ) -> Iterator[tuple[list[int], Tensor, Stream]]:
        """Draw branches to the end of their videos, in calls of one size: yields their rows, records and streams."""
        if not rows:
            return
        size, shared = self._size(samples[rows[0]].group), self.source.shared(prefix, fork)
        for filled, new in fixed_batches(len(rows), size):
            part = [rows[i] for i in filled[:new].tolist()]
            stream, recorded = self.source.explore(prefix, fork, shared, [samples[row] for row in part], size)
            stream = stream.until(stream.end, [fork.shared])
            yield part, recorded[:new], stream.first(new)

    def _end(self, fork: int) -> int:
        """Return the frame behind which a video that forks at a frame is not drawn."""
        model = self.model
        return drawn_until(fork, self.explore, model.window.block, model.latent_shape[1], self.whole)

    def _size(self, group: PromptGroup) -> int:
        """Return how many branches of a group are drawn together, whoever draws them."""
        return min(self.rows, group.size)

    def _calls(self, samples: Sequence[Sample], script: Script) -> int:
        """Count the network calls that drawing samples of one group takes."""
        group, model = samples[0].group, self.model
        fork, level = place_of(self.source.forks(script), self.seed, group.update, group.group)
        anchors = sum(sample.is_anchor for sample in samples)
        batches = number_of_calls(len(samples) - anchors, self._size(group))
        anew = renewed_blocks(model.window, fork) if fork and fork in script.starts else 0
        shared, rest = self.explore.shared_levels(level), script.calls(fork, self._end(fork), model, ends=True)
        common = script.calls(0, fork, model, ends=False) + anew + (shared if batches else 0)
        return common + batches * (rest - shared) + anchors * rest
