"""Drawing videos block by block: the only loop over blocks that a rollout and an evaluation have."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashgrpo.processes.streaming.cache import Context, KVCache
from flashgrpo.processes.streaming.levels import walk_levels
from flashgrpo.processes.streaming.model import StreamingModel
from flashgrpo.processes.streaming.window import Window
from flashgrpo.seeds import Name, normal
from flashgrpo.types import Condition, Latents, to_device

BlockName = Callable[[int, int], Name]
"""(first frame of a block, number of its level) -> name of the noise that is added there."""
Levels = tuple[list[Latents], list[Latents]]
"""The noisy inputs and the predictions of a block, level by level."""
Noise = Sequence[Tensor | None]
"""Of a block, level by level; the first has some."""


@dataclass(frozen=True)
class Script:
    """Under which conditions blocks are drawn: `conditions[i]`, a row for all or for each, from `starts[i]` on."""

    starts: Sequence[int]
    conditions: Sequence[Condition]

    @staticmethod
    def joined(scripts: Sequence["Script"]) -> "Script":
        """Return scripts whose scenes begin at the same frames as one of several rows."""
        scenes = zip(*(script.conditions for script in scripts), strict=True)
        return Script(scripts[0].starts, [Condition.stack(rows) for rows in scenes])

    def scene(self, frame: int) -> int:
        """Return the number of the scene that a frame belongs to."""
        return max(i for i, start in enumerate(self.starts) if start <= frame)

    def at(self, frame: int) -> Condition:
        """Return the condition of the block that begins at a frame."""
        return self.conditions[self.scene(frame)]

    def calls(self, first: int, last: int, model: StreamingModel, ends: bool) -> int:
        """Count the network calls that drawing the blocks between two frames takes, un-routed or not.

        Args:
            ends: whether nothing is drawn behind them.
        """
        window = model.window
        blocks = window.begun(last) - window.begun(first)
        committed = blocks - (ends and blocks > 0)
        anew = sum(renewed_blocks(window, start) for start in self.starts if first < start < last)
        return blocks * len(model.levels) + committed + anew


@dataclass(frozen=True)
class Stream:
    """Videos as far as they are drawn: B rows of one script; drawing returns another and leaves this as it is.

    Args:
        cache: of the frames that later blocks may attend to; where all rows are alike it may have one row.
        latents: (B, C, F, H, W) of the frames so far, but for the first `forgotten` ones.
        remembered: last frames that the cache keeps, beside the window's sink.
        end: frame behind which nothing is drawn.
        scene: number of the script's scene under which the last frames are cached.
    """

    model: StreamingModel
    script: Script
    cache: KVCache
    latents: Latents
    remembered: int
    end: int
    scene: int = 0
    forgotten: int = 0

    @classmethod
    def begun(
        cls, model: StreamingModel, script: Script, rows: int, remembered: int = 0, end: int | None = None
    ) -> "Stream":
        """Begin videos, of which nothing is drawn yet; they end at frame `end`, or where the model's do."""
        channels, frames, height, width = model.latent_shape
        device = next(iter(script.conditions[0].tensors.values())).device
        nothing = torch.empty(rows, channels, 0, height, width, device=device)
        least = model.window.frames + model.window.block
        return cls(model, script, KVCache(), nothing, max(remembered, least), end or frames)

    @property
    def frame(self) -> int:
        """The first frame of the next block."""
        return self.forgotten + self.latents.shape[2]

    def forgetting(self) -> "Stream":
        """Return the stream with the latents that later blocks need, and no earlier ones."""
        dropped = max(0, self.latents.shape[2] - self.model.window.frames)
        return replace(self, latents=self.latents[:, :, dropped:].clone(), forgotten=self.forgotten + dropped)

    def repeated(self, rows: int) -> "Stream":
        """Return the stream of one video as that of `rows` equal ones."""
        return replace(self, latents=self.latents.expand(rows, -1, -1, -1, -1))

    def first(self, rows: int) -> "Stream":
        """Return the first rows of what is drawn, without a cache."""
        return replace(self, latents=self.latents[:rows], cache=KVCache())

    def at_its_prompt(self) -> "Stream":
        """Return the stream with its last frames cached anew where the next block begins a scene."""
        scene = self.script.scene(self.frame)
        if scene == self.scene:
            return self
        recent = self.latents[:, :, self.model.window.recent(self.frame) - self.forgotten :]
        if self.cache.rows == 1:
            recent = recent[:1]  # all rows are alike
        cache = self.model.recache(self.cache, recent, self.condition(len(recent)))
        return replace(self, cache=cache, scene=scene)

    def condition(self, rows: int) -> Condition:
        """Return the condition of the next block, for a number of rows."""
        row = self.script.at(self.frame).tensors
        return Condition({name: tensor.expand(rows, *tensor.shape[1:]) for name, tensor in row.items()})

    def clean_context(self) -> Context | None:
        """Return what the next block attends to, un-routed."""
        return self.cache.context(self.model.window.past(self.frame))

    def levels(self, context: Context | None, noise: Noise, first: int = 0, until: int | None = None) -> Levels:
        """Draw the next block at its levels from number `first` on, from noise (B, C, block, H, W) of each.

        Args:
            noise: the input at level `first`, and what is added at each later level.
            until: number of the first level that is not drawn.
        """
        begin, *renoise = noise
        assert begin is not None, "the first level has noise"
        condition = self.condition(len(begin))

        def velocity(x: Tensor, sigma: float) -> Tensor:
            return self.model.velocity(x, sigma, self.frame, context, condition)

        walk = walk_levels(velocity, begin, renoise, self.model.levels[first:until])
        inputs, predictions = zip(*walk, strict=True)
        return list(inputs), list(predictions)

    def followed_by(self, block: Latents, context: Context | None) -> "Stream":
        """Return the stream with a finished block behind it, and in its cache."""
        latents = torch.cat([self.latents, block], dim=2)
        frame = self.forgotten + latents.shape[2]
        if frame == self.end:
            return replace(self, latents=latents)  # nothing comes that could look at it
        cache = self.model.commit(self.cache, block, context, self.condition(len(block)))
        kept = range(frame - self.remembered, frame)
        return replace(self, latents=latents, cache=cache.only([*range(self.model.window.sink), *kept]))

    def until(self, frame: int, names: Sequence[BlockName]) -> "Stream":
        """Draw un-routed blocks until a frame, each row from the noise of its name; (B) names, or one for all."""
        stream = self
        while stream.frame < frame:
            stream = stream.at_its_prompt()
            context = stream.clean_context()
            noise = stream.noise(names)
            _, predictions = stream.levels(context, noise)
            stream = stream.followed_by(predictions[-1], context)
        return stream

    def noise(self, names: Sequence[BlockName]) -> Noise:
        """Draw the noise of the next block at each level, (B, C, block, H, W) or none; one name serves all rows."""
        rows, device = len(self.latents), self.latents.device
        drawn = (block_noise(self.model, names, self.frame, level) for level in range(len(self.model.levels)))
        return [eps if eps is None else to_device(eps, device).expand(rows, -1, -1, -1, -1) for eps in drawn]


def renewed_blocks(window: Window, start: int) -> int:
    """Count the blocks that are cached anew where a scene begins at a frame."""
    return window.begun(start) - window.begun(window.recent(start))


def block_noise(model: StreamingModel, names: Sequence[BlockName], frame: int, level: int) -> Tensor | None:
    """Draw the noise that blocks at a frame get at a level, a row for each name, on the CPU; or none."""
    if level and not model.renoises:
        return None
    channels, _, height, width = model.latent_shape
    shape = channels, model.window.size(frame), height, width
    return torch.stack([normal(shape, *name(frame, level)) for name in names])
