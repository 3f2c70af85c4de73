"""The streaming process: videos drawn block by block, whose branches part at a fork and are scored again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError
from flashgrpo.process import Cost, Finding, OnDrawn, Outputs, PipelineCall, Record
from flashgrpo.processes.calls import missing_calls
from flashgrpo.processes.of_model import ModelProcess
from flashgrpo.processes.streaming.checks import branches_differ
from flashgrpo.processes.streaming.clips import clips_of, cut, video_frame
from flashgrpo.processes.streaming.cost import place_of, update_cost
from flashgrpo.processes.streaming.decoding import decode
from flashgrpo.processes.streaming.drawing import BlockName, Script, Stream
from flashgrpo.processes.streaming.energy import RoutedBranches
from flashgrpo.processes.streaming.model import StreamingModel
from flashgrpo.processes.streaming.renoised import RenoisedBlocks
from flashgrpo.processes.streaming.rollout import Groups
from flashgrpo.processes.streaming.scenes import scenes_of
from flashgrpo.processes.streaming.settings import (
    Energy,
    NoisedBlock,
    OneLevel,
    Routing,
    StreamExplore,
    StreamRollout,
    StreamScore,
    Transition,
)
from flashgrpo.processes.streaming.source import Addend, Source, StreamState
from flashgrpo.processes.streaming.transition import OneTransition
from flashgrpo.seeds import Name
from flashgrpo.types import WHOLE, Clip, Prompt, Sample, Videos
from flashgrpo.video import Video


class StreamingProcess(ModelProcess[StreamingModel]):
    """A streaming video model as a `Process`.

    Attributes:
        source: where branches part, how they differ, and what is scored of them.
        micro_batch: units replayed at once, and rows of every call of the network whose result is judged.
        whole: whether an update's videos are drawn to their end; otherwise as far as branches differ in their context
            or noise, which is where rewards look that say `looks_at: chunk`.
    """

    views: Sequence[str] = (WHOLE, "chunk", "clips")

    def __init__(
        self,
        model: StreamingModel,
        explore: StreamExplore,
        score: StreamScore,
        rollout: StreamRollout,
        micro_batch: int,
        anchored: bool,
        whole: bool,
        world: World,
    ) -> None:
        super().__init__(model, min(micro_batch, rollout.group_size), world)
        self.rollout = rollout
        self.anchored, self.whole = anchored, whole
        self.explore, self.score = explore, score

    @cached_property
    def source(self) -> Source:
        """Where branches part; made by what draws them, since a video that is too short for them can be sampled.

        Raises:
            UserError: they part nowhere in a video of this length.
        """
        explore, score, model = self.explore, self.score, self.model
        try:
            explore.places(model.latent_shape[1], model.window, len(model.levels))
        except ValueError as error:
            raise UserError(str(error)) from error
        if isinstance(explore, Routing) and isinstance(score, Energy):
            return RoutedBranches(self.model, explore, score, self.micro_batch)
        assert isinstance(explore, OneLevel), "refused by `check_pair`"
        if isinstance(score, NoisedBlock):
            return RenoisedBlocks(self.model, explore, score, self.micro_batch)
        assert isinstance(score, Transition), "refused by `check_pair`"
        return OneTransition(self.model, explore, score, self.micro_batch)

    def exploring(self, explore: StreamExplore, score: StreamScore) -> "StreamingProcess":
        """Return the same model, not copied or loaded again, that draws and scores otherwise."""
        other = super().exploring(explore, score)
        other.__dict__.pop("source", None)
        other.source.average = self.source.average
        return other

    def set_average(self, weights: Callable[[], AbstractContextManager[None]]) -> None:
        """Say in which context the network has the averaged weights; see `Process`. A run begins with this."""
        self.source.average = weights

    @property
    def addends(self) -> int:
        """How many addends a replay hands out."""
        return self.source.addends

    # Drawing

    def script(self, prompt: Prompt) -> Script:
        """Return the scenes of a prompt, encoded."""
        model = self.model
        scenes = scenes_of(prompt, model.latent_shape[1], model.window, model.stride)
        condition = self.model.encode([scene.prompt for scene in scenes])
        rows = [condition[slice(row, row + 1)] for row in range(len(scenes))]
        return Script([scene.start for scene in scenes], rows)

    @torch.no_grad()
    def draw(
        self, samples: Sequence[Sample], seed: int, on_drawn: OnDrawn, uses: int = 1, columns: Sequence[str] = ()
    ) -> tuple[Outputs, Record]:
        """Draw samples, group by group: a prefix once, then the branches, and the anchor; see `Process`."""
        rows = self.rollout.micro_batch
        groups = Groups(self.model, self.source, self.explore, rows, self.whole, self.world, seed)
        outputs, state, members = groups.draw(samples, self.script, on_drawn)
        return outputs, self._record(state, members, samples, uses, columns)

    def _record(
        self, state: StreamState, members: list[int], samples: Sequence[Sample], uses: int, columns: Sequence[str]
    ) -> Record:
        """Record a term for each branch."""
        sample = torch.tensor(members, dtype=torch.int64)
        key = torch.tensor([samples[row].group.group for row in members], dtype=torch.int64)
        slot = torch.tensor([self.source.slot(fork) for fork in state.of_units], dtype=torch.int64)
        weight = torch.tensor([self.source.weight(fork) for fork in state.of_units], device=self.device)
        unit = torch.arange(len(sample))
        record = Record(slot, unit, sample, key, torch.zeros_like(sample), weight.float(), None, state)
        if uses == 1:
            return record
        old, kept = self.old_scores(record, self.source.keeps(columns))
        return self.source.with_kept(replace(record, old=old), kept)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt], names: Sequence[Name], on_drawn: OnDrawn, num_steps: int | None = None
    ) -> Outputs:
        """Draw un-routed videos; see `Process`. A streaming model has its own levels, so `num_steps` is refused."""
        _refuse_steps(num_steps)
        outputs = torch.empty(len(prompts), *self.model.latent_shape, device=self.device)
        scripts = [self.script(prompt) for prompt in prompts]
        parts = list(self._alike(scripts))
        frames = self.model.latent_shape[1]
        calls = sum(scripts[part[0]].calls(0, frames, self.model, ends=True) for part in parts)
        missing = missing_calls(self.world, calls)
        for part in parts:
            stream = Stream.begun(self.model, Script.joined([scripts[row] for row in part]), len(part))
            outputs[part] = stream.until(frames, [evaluation_name(names[row]) for row in part]).latents
            on_drawn(torch.tensor(part), outputs[part])
        self.source.call_on_nothing(missing)
        return outputs

    @torch.no_grad()
    def stream(self, prompt: Prompt, name: Name, num_steps: int | None = None) -> Iterator[Video]:
        """Draw an un-routed video and hand out its blocks, each as soon as it is drawn and decoded; see `Process`."""
        _refuse_steps(num_steps)
        frames, window, state = self.model.latent_shape[1], self.model.window, None
        stream = Stream.begun(self.model, self.script(prompt), 1)
        while stream.frame < frames:
            first = stream.frame
            last = window.next_start(first + 2)  # one frame alone would be an image
            stream = stream.until(min(last, frames), [evaluation_name(name)])
            video, state = self.model.decode(stream.latents[:, :, first - stream.forgotten :], state)
            stream = stream.forgetting()
            yield video[0]

    def _alike(self, scripts: Sequence[Script]) -> Iterator[list[int]]:
        """Cut rows into micro-batches of scripts whose scenes begin at the same frames."""
        order = sorted(range(len(scripts)), key=lambda row: (tuple(scripts[row].starts), row))
        for _, rows in groupby(order, key=lambda row: tuple(scripts[row].starts)):
            alike = list(rows)
            for first in range(0, len(alike), self.rollout.micro_batch):
                yield alike[first : first + self.rollout.micro_batch]

    def media(self, outputs: Outputs, frames: int | None = None) -> Videos:
        """Return videos (B, F, 3, H, W) in [0, 1] of latents; with `frames` at least the first of F."""
        return decode(self.model, outputs, frames)

    def clips(self, view: str, prompt: Prompt, sample: tuple[Sample, int] | None) -> Sequence[Clip]:
        """Return clips of the "chunk" in which branches differ, or of all; of an evaluation, of all."""
        model = self.model
        frames = model.latent_shape[1]
        scenes = scenes_of(prompt, frames, model.window, model.stride)
        if view == "clips" or sample is None:
            return clips_of(scenes, frames, model.stride, self.rollout.clip)
        (drawn, seed), script = sample, Script([scene.start for scene in scenes], ())
        frame, _ = place_of(self.source.forks(script), seed, drawn.group.update, drawn.group.group)
        last = frame + self.explore.blocks * model.window.block
        prompt = scenes[script.scene(frame)].prompt
        span = video_frame(frame, model.stride), video_frame(last, model.stride)
        return [Clip(first, stop, prompt) for first, stop in cut(*span, self.rollout.clip)]

    # Scoring again

    def replay(self, record: Record, columns: Sequence[str]) -> Iterator[Addend]:
        """Score units again by the weights that there are now; see `source`."""
        state: StreamState = record.state  # type: ignore[assignment]
        return self.source.replay(state, columns)

    def idle(self, slot: int, columns: Sequence[str]) -> Iterator[Tensor]:
        """Take part in the collectives of a replay, without a gradient of one's own."""
        return self.source.idle(slot, columns)

    # What it costs, whether it is sound, getting the result out

    def cost(self, seed: int, update: int, passes: int, columns: Sequence[str], uses: int = 1) -> Cost:
        """Forwards of an update, commits among them; see `cost.py`. Prompts that switch are cached anew besides."""
        model = self.model
        return update_cost(
            self.explore,
            self.score,
            self.rollout,
            model.latent_shape[1],
            len(model.levels),
            self.anchored,
            self.whole,
            seed,
            update,
            passes,
            columns,
            uses,
            model.recomputes,
        )

    def pipeline_call(self, given: Mapping[str, Any]) -> PipelineCall | None:
        """Return the model's own pipeline, where it has one that streams."""
        return self.model.pipeline_call(given)

    def checks(self, record: Record, outputs: Outputs, seed: int, thorough: bool) -> Sequence[Finding]:
        """Whether the branches of a group differ."""
        return [branches_differ(record, outputs)]


def _refuse_steps(num_steps: int | None) -> None:
    if num_steps is not None:
        raise UserError("--steps: a streaming model draws at the levels that it was trained at; leave it out")


def evaluation_name(name: Name) -> BlockName:
    """Return the names of the noise of a sample whose own name this is."""
    return lambda frame, level: (*name, "stream", frame, level)
