"""Make the bundled pipeline from nothing: ``python -m tools.tiny.build [--out DIR] [--seed 0] [--quick]``.

The result is a diffusers ``WanPipeline`` like any Wan checkpoint, with tiny widths. First the autoencoder learns
to reproduce rendered clips, then text encoder and transformer learn rectified flow on its latents: with the right
captions until the words are known, then with captions that are wrong in part (``Recipe.wrong_caption_share``). So the
model draws crisp clips but follows its prompt imperfectly, which leaves alignment something real to do: at guidance 2
the agreement on held-out captions is about 0.63.

The shipped weights are the output of one call with the defaults, which took 47 minutes on one thread of a two-core
machine whose other core was at work: 12 for the autoencoder, 15 for its decoder alone, 18 for the flow.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashgrpo.files import write_aside
from flashgrpo.rewards.shapes import ATTRIBUTES
from tools.tiny.architecture import FLOW_SHIFT, LATENT_CHANNELS, TEXT_LENGTH, make_pipeline
from tools.tiny.muon import Muon
from tools.tiny.world import FRAMES, TINY, Combination, caption, render, train_combinations

Component = Any
"""``AutoencoderKLWan`` or ``WanPipeline``, whose attributes type checkers cannot see."""
WEIGHTS = TINY / "weights"


@dataclass(frozen=True)
class Recipe:
    """Steps, sizes and learning rates of the three stages.

    ``clips_per_caption`` clips are encoded once and used for all of the flow training. ``clean_steps`` are the first
    of the ``flow_steps``. An attribute's word is redrawn with probability ``wrong_caption_share``.
    """

    image_steps: int = 300
    video_steps: int = 900
    decoder_steps: int = 2000
    autoencoder_batch: int = 4
    autoencoder_lr: float = 2e-2
    kl_weight: float = 1e-4
    clips_per_caption: int = 64
    clean_steps: int = 800
    flow_steps: int = 2200
    flow_batch: int = 64
    flow_lr: float = 2e-2
    ema_decay: float = 0.995
    wrong_caption_share: float = 0.62
    caption_dropout: float = 0.1


QUICK = Recipe(
    image_steps=2,
    video_steps=2,
    decoder_steps=2,
    clips_per_caption=1,
    clean_steps=6,
    flow_steps=12,
    flow_batch=16,
    ema_decay=0.5,
)
"""Barely trained: for testing the recipe itself."""


def autoencoder_batches(size: int, image_steps: int, video_steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Freshly rendered clips as the autoencoder takes them, (size, 3, F, H, W) in [-1, 1].

    The batches of the first ``image_steps`` are four times as many single frames: space is learned cheaply first.
    """
    combinations = train_combinations()
    for step in range(image_steps + video_steps):
        images = step < image_steps
        picks = torch.randint(len(combinations), (size * 4 if images else size,), generator=generator).tolist()
        clips = render([combinations[i] for i in picks], generator).transpose(1, 2) * 2 - 1
        yield clips[:, :, FRAMES // 2, None] if images else clips


def warm_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rate: linear up over the first 50 steps, or a tenth, then a half cosine down to zero."""
    warmup = max(1, min(50, steps // 10))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_autoencoder(vae: Component, recipe: Recipe, seed: int) -> None:
    """Both halves together, then the decoder alone, at half the cost a step."""
    with torch.no_grad():  # start with a posterior that says something: standard deviation exp(-6 / 2) = 0.05
        vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0
    fit_autoencoder(vae, recipe, recipe.image_steps, recipe.video_steps, recipe.autoencoder_lr, seeded(seed))
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    fit_autoencoder(vae, recipe, 0, recipe.decoder_steps, recipe.autoencoder_lr / 2, seeded(seed + 1))
    vae.requires_grad_(False)


def fit_autoencoder(
    vae: Component, recipe: Recipe, image_steps: int, video_steps: int, lr: float, generator: torch.Generator
) -> None:
    """Absolute plus squared error, which keeps edges crisp, and a little KL, which keeps the latents in one scale."""
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = Muon(parameters, lr=lr, adam_lr=lr / 10)
    schedule = warm_cosine(optimizer, image_steps + video_steps)
    progress = Progress("autoencoder", image_steps + video_steps)
    for clips in autoencoder_batches(recipe.autoencoder_batch, image_steps, video_steps, generator):
        posterior = vae.encode(clips).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - clips
        # The object covers a fourteenth of the picture; without a higher weight it is found late.
        typical = clips.flatten(2).median(dim=2).values[:, :, None, None, None]
        weight = 1 + 10 * (clips - typical).abs()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = (weight * (error.abs() + error.square())).mean() + recipe.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress(loss)


@torch.no_grad()
def encode_world(vae: Component, clips_per_caption: int, generator: torch.Generator) -> Tensor:
    """Latents of freshly rendered clips, (captions, clips_per_caption, C, F, H, W), zero mean and unit variance.

    Writes each channel's mean and standard deviation into the autoencoder's config, where ``WanPipeline`` looks.
    """
    combinations = train_combinations()
    latents = torch.stack(
        [
            vae.encode(clips).latent_dist.mean
            for clips in (render(combinations, generator).transpose(1, 2) * 2 - 1 for _ in range(clips_per_caption))
        ],
        dim=1,
    )
    mean, std = latents.mean(dim=(0, 1, 3, 4, 5)), latents.std(dim=(0, 1, 3, 4, 5))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return (latents - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)


def caption_confusion(combinations: list[Combination], share: float) -> Tensor:
    """Row i: the probability of every caption for a clip of combination i, (N, N), rows sum to 1.

    Each attribute is independently redrawn from its whole vocabulary with probability ``share``. Captions that are
    not in ``combinations`` (the held-out ones) get no probability.
    """
    confusion = torch.ones(len(combinations), len(combinations))
    for name, known in ATTRIBUTES.items():
        words = torch.tensor([known.index(getattr(c, name)) for c in combinations])
        same = (words[:, None] == words[None, :]).float()
        confusion *= (1 - share) * same + share / len(known)
    return confusion / confusion.sum(dim=1, keepdim=True)


def train_flow(pipe: Component, latents: Tensor, recipe: Recipe, generator: torch.Generator) -> None:
    """Rectified flow: predict ``eps - x0`` from ``(1 - sigma) x0 + sigma eps``; the averaged weights are kept.

    Captions are right for the first ``clean_steps``: with three in four wrong, no word had an effect after 750 steps.
    """
    combinations = train_combinations()
    truth, confusion = (caption_confusion(combinations, share) for share in (0.0, recipe.wrong_caption_share))
    texts = pipe.tokenizer(
        [caption(c) for c in combinations] + [""], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
    )
    model = nn.ModuleDict({"text_encoder": pipe.text_encoder, "transformer": pipe.transformer}).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = Muon(model.parameters(), lr=recipe.flow_lr, adam_lr=recipe.flow_lr / 10)
    schedule = warm_cosine(optimizer, recipe.flow_steps)
    progress = Progress("flow", recipe.flow_steps)
    size = recipe.flow_batch
    for step in range(recipe.flow_steps):
        shown = torch.randint(len(combinations), (size,), generator=generator)
        clip = torch.randint(latents.shape[1], (size,), generator=generator)
        belief = truth if step < recipe.clean_steps else confusion
        told = torch.multinomial(belief[shown], 1, generator=generator)[:, 0]
        told[torch.rand(size, generator=generator) < recipe.caption_dropout] = len(combinations)  # the empty caption
        mask = texts.attention_mask[told]
        embeds = pipe.text_encoder(texts.input_ids[told], mask).last_hidden_state * mask[..., None]

        x0 = latents[shown, clip]
        uniform = torch.rand(size, generator=generator)
        sigma = FLOW_SHIFT * uniform / (1 + (FLOW_SHIFT - 1) * uniform)
        eps = torch.randn(x0.shape, generator=generator)
        noisy = torch.lerp(x0, eps, sigma.view(-1, 1, 1, 1, 1))
        velocity = pipe.transformer(noisy, 1000 * sigma, embeds, return_dict=False)[0]
        loss = (velocity - (eps - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(recipe.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
        progress(loss)
    model.load_state_dict(average.state_dict())
    model.eval().requires_grad_(False)


def seeded(seed: int) -> torch.Generator:
    """A generator for one stage, so that a stage draws the same whatever ran before it."""
    return torch.Generator().manual_seed(seed)


class Progress:
    """Prints the mean loss since the last line and the elapsed seconds, about thirty lines a stage."""

    def __init__(self, name: str, steps: int, done: int = 0) -> None:
        self.name, self.steps, self.every = name, steps, max(1, steps // 30)
        self.losses: list[float] = []
        self.start = time.perf_counter()
        self.step = done

    def __call__(self, loss: Tensor) -> None:
        self.step += 1
        self.losses.append(loss.item())
        if self.step % self.every == 0 or self.step == self.steps:
            mean, seconds = sum(self.losses) / len(self.losses), time.perf_counter() - self.start
            print(f"{self.name} {self.step}/{self.steps}  loss {mean:.4f}  {seconds:.0f} s", flush=True)
            self.losses.clear()


def save(pipe: Component, out: Path) -> None:
    """Save as fp16 safetensors."""
    with write_aside(out) as aside:
        pipe.to(torch.float16).save_pretrained(aside, safe_serialization=True)
        for name in (
            "model_index.json",
            "tokenizer/tokenizer_config.json",
        ):  # transformers 5 writes a name that 4 lacks
            config = aside / name
            config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def build(out: Path = WEIGHTS, seed: int = 0, recipe: Recipe | None = None) -> Component:
    """Train everything from nothing and save it in ``out``; the same seed and machine give the same weights."""
    recipe = recipe or Recipe()
    pipe: Component = make_pipeline(seed)
    train_autoencoder(pipe.vae, recipe, seed)
    latents = encode_world(pipe.vae, recipe.clips_per_caption, seeded(seed + 2))
    train_flow(pipe, latents, recipe, seeded(seed + 3))
    save(pipe, out)
    return pipe


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the bundled tiny Wan pipeline from nothing.")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder to write (default: inside the package)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="barely train, for testing the recipe")
    options = parser.parse_args()
    start = time.perf_counter()
    build(options.out, options.seed, QUICK if options.quick else None)
    print(f"saved {options.out} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
