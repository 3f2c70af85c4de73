"""Make the bundled streaming model: ``python -m tools.streaming.build [--out DIR] [--work DIR] [--seed 0] [--quick]``.

It begins with the bundled pipeline of short clips (``tools.tiny.build``), whose text encoder and autoencoder it keeps.
The transformer learns, on long videos with captions that may change, to draw a block of three latent frames from the
frames before it, by rectified flow with a block-causal mask. A row is a video twice: clean, then with each block noised
to a level of its own, most often one of the four that it will be drawn at. A noisy block attends to itself and to its
window of clean frames, which are what a cache holds. A second stage is about the blocks at which captions change.

Captions are wrong in part (``Lesson.wrong_caption_share``), so videos follow their prompts imperfectly, and no block
is ever trained on what the model itself drew, so errors add up along a video: alignment has something to do.

All of it is a function of the seed, on one machine. What is done is kept in ``--work`` every minute: the same command
continues where it was ended.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from flashgrpo.files import read_object, write_json
from flashgrpo.models.causal.network import CausalNetwork
from flashgrpo.processes.streaming.window import Window
from tools.streaming.data import QUICK, Batch, Lesson, Recipe, World, batches, encode_world, per_frame, write_kept
from tools.streaming.world import BLOCK, LATENT_FRAMES
from tools.tiny.build import WEIGHTS as CLIPS
from tools.tiny.build import Progress, save, warm_cosine
from tools.tiny.muon import Muon
from tools.tiny.world import TINY

WEIGHTS = TINY / "streaming"
WORK = Path("runs/streaming-build")
WINDOW = Window(sink=3, local=9, block=BLOCK)
POSITIONS = 1024
"""Latent frames that the transformer has positions for, as real Wan."""
KEEP_SECONDS = 60


def transformer_for_streams(clips: Any) -> WanTransformer3DModel:
    """The transformer of the short clips with positions for long videos, which are no weights."""
    config = {name: value for name, value in clips.config.items() if not name.startswith("_")}
    transformer = WanTransformer3DModel(**{**config, "rope_max_seq_len": POSITIONS})
    transformer.load_state_dict(clips.state_dict())
    return transformer


def block_causal_mask() -> Tensor:
    """Rows and columns are all clean frames, then all noisy ones; true where a frame attends to another, (2F, 2F).

    A frame attends to its block, clean or noisy as it is itself, and to the clean frames of the window before it.
    """
    mask = torch.zeros(2 * LATENT_FRAMES, 2 * LATENT_FRAMES, dtype=torch.bool)
    for start in range(0, LATENT_FRAMES, BLOCK):
        for own in (start, LATENT_FRAMES + start):
            mask[own : own + BLOCK, list(WINDOW.past(start))] = True
            mask[own : own + BLOCK, own : own + BLOCK] = True
    return mask


def velocity(network: CausalNetwork, batch: Batch, mask: Tensor) -> Tensor:
    """The velocity of each block's noisy version, from the clean frames before it; both are computed together."""
    frames = torch.arange(LATENT_FRAMES).repeat(2)
    sigma = per_frame(batch.sigma)
    levels = torch.cat([torch.zeros_like(sigma), sigma], dim=1)
    both = network.masked(torch.cat([batch.clean, batch.noisy], dim=2), levels, frames, mask, batch.text)
    return both[:, :, LATENT_FRAMES:]


def error(v: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error over the blocks that count."""
    squared = (v - target).square().mean(dim=(1, 3, 4))  # (B, F)
    return (per_frame(weight) * squared).sum() / per_frame(weight).sum().clamp_min(1)


class Stage:
    """A stage's weights, average and optimizer, which are kept in a file and found there again."""

    def __init__(self, transformer: nn.Module, lesson: Lesson, work: Path) -> None:
        self.transformer, self.steps, self.file = transformer, lesson.steps, work / f"{lesson.name}.pt"
        self.average = copy.deepcopy(transformer.state_dict())
        self.optimizer = Muon(transformer.parameters(), lr=lesson.lr, adam_lr=lesson.lr / 10)
        self.schedule = warm_cosine(self.optimizer, lesson.steps)
        self.step = 0
        self.kept = time.perf_counter()
        if self.file.exists():
            kept = torch.load(self.file, weights_only=True)
            self.step, self.average = kept["step"], kept["average"]
            transformer.load_state_dict(kept["weights"])
            self.optimizer.load_kept(kept["optimizer"])
            self.schedule.load_state_dict(kept["schedule"])
            print(f"{lesson.name}: {self.step} of {lesson.steps} steps are done", flush=True)

    def learn(self, loss: Tensor, decay: float) -> None:
        """Take one step, and keep everything when a minute has passed or the stage is done."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        decay = min(decay, (self.step + 1) / (self.step + 10))
        for name, parameter in self.transformer.named_parameters():
            self.average[name].lerp_(parameter.detach(), 1 - decay)
        if self.step == self.steps or time.perf_counter() - self.kept > KEEP_SECONDS:
            self.keep()

    def keep(self) -> None:
        """Write all that the next step depends on."""
        state = {
            "step": self.step,
            "weights": self.transformer.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.kept(),
            "schedule": self.schedule.state_dict(),
        }
        write_kept(state, self.file)
        self.kept = time.perf_counter()

    def finish(self) -> None:
        """Leave the averaged weights in the network."""
        self.transformer.load_state_dict(self.average)


def train(transformer: WanTransformer3DModel, world: World, recipe: Recipe, work: Path, seed: int) -> None:
    """Take one lesson after the other, each from the averaged weights of the one before."""
    network, mask = CausalNetwork(transformer), block_causal_mask()
    for lesson in recipe.lessons:
        stage = Stage(transformer, lesson, work)
        progress = Progress(lesson.name, lesson.steps, stage.step)
        for batch in batches(world, lesson, recipe.batch, stage.step, seed):
            loss = error(velocity(network, batch, mask), batch.eps - batch.x0, batch.weight)
            stage.learn(loss, recipe.ema_decay)
            progress(loss)
        stage.finish()


def build(out: Path = WEIGHTS, work: Path = WORK, seed: int = 0, recipe: Recipe | None = None) -> Any:
    """Train from the bundled clips' model and save a pipeline in ``out``."""
    recipe = recipe or Recipe()
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    begun = {"seed": seed, "recipe": repr(recipe)}
    if (file := work / "recipe.json").exists() and read_object(file) != begun:
        raise SystemExit(f"{work} holds what another seed or recipe has begun; give another --work, or delete it")
    write_json(file, begun)
    pipe: Any = WanPipeline.from_pretrained(CLIPS, dtype=torch.float32)
    for part in (pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    world = encode_world(pipe, recipe, work, seed)
    pipe.transformer = transformer_for_streams(pipe.transformer)
    train(pipe.transformer, world, recipe, work, seed)
    save(pipe, out)
    return pipe


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the bundled streaming model from the bundled clips' model.")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder to write (default: inside the package)")
    parser.add_argument("--work", type=Path, default=WORK, help="folder in which what is done is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="barely train, for testing the recipe")
    options = parser.parse_args()
    start = time.perf_counter()
    build(options.out, options.work, options.seed, QUICK if options.quick else None)
    print(f"saved {options.out} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
