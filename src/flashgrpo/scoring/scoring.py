"""The samples of an update or an evaluation decoded and scored while later ones are being drawn -> RewardTable."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from flashgrpo.distributed.memory import explain_shortage
from flashgrpo.distributed.transfer import Piece, hand_over, pieces
from flashgrpo.distributed.world import World
from flashgrpo.media import Medium, with_sound
from flashgrpo.process import MakesMedia, MakesSound, Outputs, Process
from flashgrpo.scoring.batch import Batch, Columns
from flashgrpo.scoring.clips import ClipBatch
from flashgrpo.scoring.groups import Groups
from flashgrpo.scoring.inputs import LatentVideos, decoded_for
from flashgrpo.scoring.rewards import Results, Rewards
from flashgrpo.types import WHOLE, Clip, Media, Prompt, RewardTable, Waves, index_rows

AHEAD = 4  # micro-batches that may wait for a reward while others are drawn: what bounds the memory of videos


Watch = Callable[[str, int, int], None]
"""Told of a phase, the samples done, and how many there are of this rank; 0 when it begins."""


def unwatched(phase: str, done: int, of: int) -> None:
    """Show nothing."""


def untimed(phase: str) -> AbstractContextManager[None]:
    """Return a clock that does not run."""
    return nullcontext()


class Scoring:
    """The rewards of all samples of an update or an evaluation, begun while the later ones are still being drawn.

    Args:
        media: makes what rewards look at of what was drawn; see `Process.media`.
        clips: what rewards with another view than "whole" look at, by the view and the number of the sample.
        prompts: of all samples, of which this rank draws `world.share`.
        watched: whether watched rewards are computed too.
        micro_batch: outputs decoded at once.
        keep: numbers of the samples, among all, whose media are kept in `kept`.
        deferred: decode and score once all is drawn: with parts of the model that take turns on the device. What waits
            are outputs, far smaller than videos; they are decoded and scored a micro-batch at a time all the same.
        watch: told how many of this rank's samples are drawn, and how many there are.
        groups: number of each sample's group, for rewards that compare; when not given, each is one of its own.
        sound: makes the sound of what was drawn, where the model makes some; see `Process.sound`.
    """

    def __init__(
        self,
        rewards: Rewards,
        media: MakesMedia,
        clips: Callable[[str, int], Sequence[Clip]],
        world: World,
        prompts: Sequence[Prompt],
        watched: bool,
        micro_batch: int,
        keep: Sequence[int] = (),
        deferred: bool = False,
        clock: Callable[[str], AbstractContextManager[None]] = untimed,
        watch: Callable[[int, int], None] = lambda done, of: None,
        groups: Sequence[int] | None = None,
        sound: MakesSound | None = None,
    ) -> None:
        self.kept: dict[int, Medium] = {}
        self._rewards, self._media, self._world, self._prompts = rewards, media, world, prompts
        self._micro_batch, self._keep, self._clock = micro_batch, set(keep), clock
        self._names = rewards.names(watched)
        self._comparing = [name for name in self._names if rewards.compares(name)]
        self._groups = Groups(range(len(prompts)) if groups is None else groups)
        for name in self._comparing:
            self._groups.refuse_divided(name, world)
        self._clips, self._views = clips, {rewards.view(name) for name in self._names}
        takes = [rewards.takes(name) for name in self._names if rewards.view(name) == WHOLE]
        self._frames = None if keep else decoded_for(takes)
        self._decodes = self._frames != 0 or self._views != {WHOLE}
        self._hands_latents = any(isinstance(one, LatentVideos) for one in takes)
        self._sound = sound if rewards.sample_rate else None
        self._hears = any(rewards.hears(name) for name in self._names)
        self._deferred = deferred or bool(world.reward_ranks)
        self._first, self._own = world.share(len(prompts)).start, len(world.share(len(prompts)))
        self._watch, self._drawn = watch, 0
        watch(0, self._own)
        self._waiting: list[tuple[list[int], Outputs]] = []  # numbers of samples, and what was drawn
        # Numbers of the samples that each of this rank's rewards was given, in that order.
        self._scored: dict[str, list[int]] = {name: [] for name in self._names}
        self._futures: dict[str, list[Future[Columns]]] = {name: [] for name in self._names}
        self._failures = rewards.begin()

    def add(self, rows: Tensor, outputs: Outputs) -> None:
        """This rank has drawn the samples `rows` of its share, (B,), each once and in any order; outputs (B, ...)."""
        self._drawn += len(rows)
        self._watch(self._drawn, self._own)
        if not len(rows) or self._world.rank % self._world.context:  # ranks of one context have drawn the same
            return
        numbers = [self._first + row for row in rows.tolist()]
        self._waiting.append((numbers, outputs))
        while self._waiting and not self._deferred and not self._behind():
            self._score(*self._waiting.pop(0))

    def table(self) -> RewardTable:
        """The rewards of all ranks' samples in their order, the same on every rank; all ranks call this together.

        Raises:
            SharedError: a reward failed, on any rank.
        """
        if self._world.reward_ranks:
            self._score_for_others()
        while self._waiting:
            self._score(*self._waiting.pop(0))
        with self._clock("reward"):
            ranks = [results for results in self._world.on_all(self._own_results) if results]
        return self._rewards.table(ranks)

    def _own_results(self) -> Results | None:
        """Of what this rank has scored, in the order of its samples."""
        if not any(self._futures.values()):
            return None
        results = self._rewards.results(self._futures, self._failures)

        def in_order(name: str, values: Sequence[float]) -> list[float]:
            return [value for _, value in sorted(zip(self._scored[name], values, strict=True))]

        parts = results["values"].items()
        return {**results, "values": {n: {part: in_order(n, v) for part, v in of.items()} for n, of in parts}}

    def _score(self, numbers: Sequence[int], outputs: Outputs) -> None:
        """Decode some samples and have them scored here, where they were drawn."""
        self._submit(numbers, *self._decode(outputs, numbers), outputs)

    def _score_for_others(self) -> None:
        """Hand what was drawn to the ranks that score it, one piece after the other; all ranks call this together."""
        numbers = torch.tensor([number for some, _ in self._waiting for number in some])
        outputs = torch.empty(0)
        if self._waiting:
            outputs = index_rows(torch.cat([outputs for _, outputs in self._waiting]), numbers.argsort())
        self._waiting.clear()
        for piece in pieces(self._world, len(self._prompts), self._micro_batch):
            if self._world.rank in (piece.source, piece.destination):
                rows = slice(piece.numbers.start - self._first, piece.numbers.stop - self._first)
                self._pass_on(piece, outputs[rows] if self._world.rank == piece.source else None)

    def _pass_on(self, piece: Piece, outputs: Outputs | None) -> None:
        media: Any
        sound: Any
        media, sound = (None, None) if outputs is None else self._decode(outputs, piece.numbers)
        with self._clock("reward"):
            if self._decodes:
                media = hand_over(self._world, media, piece)
            if self._hears:
                sound = hand_over(self._world, sound, piece)
            if self._hands_latents:
                outputs = hand_over(self._world, outputs, piece)
        if self._world.rank == piece.destination:
            self._submit(piece.numbers, media, sound, outputs)

    def _behind(self) -> list[Future[Columns]]:
        """Those that a reward has to be done with before it gets more.

        While samples are drawn nothing waits for them, for other ranks may wait in a network call: latents are kept.
        """
        last = [futures[-AHEAD] for futures in self._futures.values() if len(futures) >= AHEAD]
        return [future for future in last if not future.done()]

    def _submit(
        self, numbers: Sequence[int], media: Media | None, sound: Waves | None, outputs: Outputs | None
    ) -> None:
        """Give some samples to the rewards of this rank, once these are not too far behind."""
        with self._clock("reward"):
            wait(self._behind())
        for view in sorted(self._views):
            names = [name for name in self._names if self._rewards.view(name) == view and name not in self._comparing]
            if names:
                self._give(names, numbers, self._seen(view, numbers, media, sound, outputs))
        for group in self._groups.completed_by(numbers, media, outputs, sound) if self._comparing else ():
            forms = group.media, group.sound, group.outputs
            self._give(self._comparing, group.numbers, self._seen(WHOLE, group.numbers, *forms))

    def _give(self, names: Sequence[str], numbers: Sequence[int], batch: Batch | ClipBatch) -> None:
        for name, future in self._rewards.submit(batch, names).items():
            self._futures[name].append(future)
            self._scored[name] += numbers

    def _seen(
        self, view: str, numbers: Sequence[int], media: Media | None, sound: Waves | None, outputs: Outputs | None
    ) -> Batch | ClipBatch:
        """Return what rewards with a view are given of some samples."""
        if view == WHOLE:
            prompts = [self._prompts[number] for number in numbers]
            latents, heard = outputs if self._hands_latents else None, sound if self._hears else None
            return Batch(prompts, self._rewards.fps, media, latents, heard, self._rewards.sample_rate)
        assert isinstance(media, Tensor)
        return ClipBatch(media, [self._clips(view, number) for number in numbers], self._rewards.fps)

    def _frames_for(self, numbers: Sequence[int]) -> int | None:
        """Return how many frames, from the first on, rewards look at in these samples; None is all of them."""
        parts = [self._clips(view, number) for view in self._views - {WHOLE} for number in numbers]
        last = max((clip.stop for of_sample in parts for clip in of_sample), default=0)
        return None if self._frames is None else max(self._frames, last)

    def _decode(self, outputs: Outputs, numbers: Sequence[int]) -> tuple[Media | None, Waves | None]:
        """Return the media of some samples and their sound, each as far as somebody looks or listens."""
        media = sound = None
        kept = [row for row, number in enumerate(numbers) if number in self._keep]
        with self._clock("decode"), explain_shortage("rollout.decode_micro_batch, or set model.vae_tiling"):
            if self._decodes:
                media = decode(self._media, outputs, self._micro_batch, self._frames_for(numbers))
            if self._sound and len(outputs) and (self._hears or kept):
                sound = torch.cat([self._sound(some).cpu() for some in outputs.split(self._micro_batch)])
        for row in kept:
            assert media is not None
            one = media[row].clone() if isinstance(media, Tensor) else media[row]
            self.kept[numbers[row]] = with_sound(one, None if sound is None else sound[row], self._rewards.sample_rate)
        return media, sound


@torch.no_grad()
def decode(media: MakesMedia, outputs: Outputs, micro_batch: int, frames: int | None = None) -> Media:
    """Return media of outputs, on the CPU, `micro_batch` at a time; of no outputs, an empty tensor.

    With `frames` only the first frames of each video.
    A full-size video is a hundred times larger than its latents: the device holds one micro-batch.
    """
    if not len(outputs):
        return torch.empty(0, 1, 3, 1, 1)
    first = media(outputs[:micro_batch], frames)
    starts = range(micro_batch, len(outputs), micro_batch)
    later: Any = (media(outputs[start : start + micro_batch], frames) for start in starts)
    if isinstance(first, list):
        return [text for texts in (first, *later) for text in texts]
    videos = torch.empty(len(outputs), *first.shape[1:])
    videos[:micro_batch] = first
    del first
    for start, some in zip(starts, later, strict=True):
        videos[start : start + micro_batch] = some
        del some
    return videos


def shown(process: Process, output: Outputs) -> Medium:
    """Return the medium of one sample that was drawn, (1, ...), on the CPU; a video with its sound, if it has one."""
    [medium] = decode(process.media, output, 1)
    return with_sound(medium, process.sound(output)[0] if process.sample_rate else None, process.sample_rate)
