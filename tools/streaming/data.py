"""The videos that the streaming model learns from, and the batches of a training step, each drawn from its name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashgrpo.processes.streaming.levels import shifted_levels
from flashgrpo.seeds import generator
from tools.streaming.world import BLOCK, BLOCKS, Script, draw_scripts, render
from tools.tiny.architecture import TEXT_LENGTH
from tools.tiny.build import Progress, caption_confusion
from tools.tiny.world import caption, train_combinations

LEVELS = shifted_levels()


@dataclass(frozen=True)
class Lesson:
    """A stage of the training.

    The learning rate falls as a half cosine of ``steps``. A level is one of the four with probability ``level_share``,
    else any. An attribute's word is redrawn with probability ``wrong_caption_share``. With ``switches`` all rows are of
    videos that switch; the block at the switch counts ``emphasis`` times, and the first block ``first`` times. Clean
    frames have noise of up to ``context_noise`` in them, as those that a model has drawn are not quite right.
    """

    name: str
    steps: int
    lr: float
    level_share: float
    wrong_caption_share: float
    switches: bool = False
    emphasis: float = 1.0
    first: float = 1.0
    context_noise: float = 0.5


@dataclass(frozen=True)
class Recipe:
    """Sizes and stages. A share ``switched`` of the videos has a switch; a batch is ``batch`` rows.

    These were chosen after what docs/log.md tells of shorter stages, and have not been run to their end.
    """

    videos: int = 216
    switched: float = 0.5
    batch: int = 8
    ema_decay: float = 0.99
    lessons: tuple[Lesson, ...] = (
        Lesson("flow", 800, lr=1e-2, level_share=0.7, wrong_caption_share=0.1, emphasis=3.0, first=4.0),
        Lesson("switches", 300, lr=5e-3, level_share=0.7, wrong_caption_share=0.1, switches=True, emphasis=3.0),
    )


QUICK = Recipe(
    videos=4,
    batch=2,
    ema_decay=0.5,
    lessons=(
        Lesson("flow", 2, lr=1e-2, level_share=0.5, wrong_caption_share=0.3, first=4.0),
        Lesson("switches", 2, lr=5e-3, level_share=1.0, wrong_caption_share=0.0, switches=True, emphasis=3.0),
    ),
)
"""Barely trained: for testing the recipe itself."""


@dataclass(frozen=True)
class World:
    """Encoded videos (N, C, F, H, W), their scripts, and an embedding (caption, L, D) of each training combination."""

    latents: Tensor
    scripts: list[Script]
    texts: Tensor


@torch.no_grad()
def encode_world(pipe: Any, recipe: Recipe, work: Path, seed: int) -> World:
    """Render and encode the videos, in the scale of the bundled latents; they are kept in ``work``."""
    combinations = train_combinations()
    scripts = draw_scripts(combinations, recipe.videos, recipe.switched, range(1, BLOCKS), seed)
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std))
    kept = work / "latents.pt"
    latents = [torch.load(kept, weights_only=True)] if kept.exists() else []
    progress = Progress("encoding", recipe.videos // 4)
    for number, part in enumerate(scripts[first : first + 4] for first in range(0, 0 if latents else len(scripts), 4)):
        videos = render(part, generator(seed, "video", number)).transpose(1, 2)
        latents.append((pipe.vae.encode(videos * 2 - 1).latent_dist.mean - mean) / std)
        progress(torch.zeros(()))
    write_kept(torch.cat(latents), kept)
    texts = pipe.tokenizer(
        [caption(c) for c in combinations], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
    )
    embeds = pipe.text_encoder(texts.input_ids, texts.attention_mask).last_hidden_state
    return World(torch.cat(latents), scripts, embeds * texts.attention_mask[..., None])


def write_kept(state: Any, file: Path) -> None:
    """Write a file aside and rename it."""
    torch.save(state, file.with_suffix(".aside"))
    file.with_suffix(".aside").rename(file)


@dataclass(frozen=True)
class Batch:
    """Rows of one training step.

    x0, and ``clean``, what is seen of it as context, (B, C, F, H, W); sigma (B, blocks) of its blocks; text (B, L, D);
    weight (B, blocks), above 0 where the block shows what the row's caption is about. A row of a video that switches
    has one of its two captions: with the second, all frames are read under it, as when a cache is made anew at the
    switch.
    """

    x0: Tensor
    clean: Tensor
    eps: Tensor
    sigma: Tensor
    text: Tensor
    weight: Tensor

    @property
    def noisy(self) -> Tensor:
        """``(1 - sigma) x0 + sigma eps``."""
        return torch.lerp(self.x0, self.eps, per_frame(self.sigma)[:, None, :, None, None])


def per_frame(of_blocks: Tensor) -> Tensor:
    """(B, blocks) -> (B, F)."""
    return of_blocks.repeat_interleave(BLOCK, dim=1)


def batches(world: World, lesson: Lesson, size: int, begin: int, seed: int) -> Iterator[Batch]:
    """Draw the batches of a lesson's steps from ``begin`` on, each from its own name."""
    combinations = train_combinations()
    confusion = caption_confusion(combinations, lesson.wrong_caption_share)
    levels = torch.tensor(LEVELS)
    numbers = [n for n, script in enumerate(world.scripts) if script.switch < BLOCKS or not lesson.switches]
    for step in range(begin, lesson.steps):
        draw = generator(seed, lesson.name, step)
        rows = torch.tensor(numbers)[torch.randint(len(numbers), (size,), generator=draw)]
        scripts = [world.scripts[row] for row in rows]
        second = [torch.rand((), generator=draw).item() < 0.5 and script.switch < BLOCKS for script in scripts]
        shown = [combinations.index(s.second if b else s.first) for s, b in zip(scripts, second, strict=True)]
        told = torch.multinomial(confusion[shown], 1, generator=draw)[:, 0]
        block, switch = torch.arange(BLOCKS)[None], torch.tensor([s.switch for s in scripts])[:, None]
        weight = ((block >= switch) == torch.tensor(second)[:, None]).float()
        weight = torch.where(block == switch, weight * lesson.emphasis, weight)
        weight = torch.where(block == 0, weight * lesson.first, weight)
        u = torch.rand(size, BLOCKS, generator=draw)
        anywhere = 5 * u / (1 + 4 * u)
        at_levels = levels[torch.randint(len(levels), (size, BLOCKS), generator=draw)]
        chosen = torch.rand(size, BLOCKS, generator=draw) < lesson.level_share
        x0 = world.latents[rows]
        eps = torch.randn(x0.shape, generator=draw)
        strength = lesson.context_noise * torch.rand(size, 1, 1, 1, 1, generator=draw)
        clean = x0 + strength * torch.randn(x0.shape, generator=draw)
        yield Batch(x0, clean, eps, torch.where(chosen, at_levels, anywhere), world.texts[told], weight)
