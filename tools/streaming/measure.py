"""Draw held-out long videos and tell what they agree with, block after block: ``python -m tools.streaming.measure``.

Each of the 36 held-out captions is drawn once, for the whole video, or with another one from the middle on
(``--switched``). The reward is ``flashgrpo.rewards.streams:agreement``, the mean of its four components, of each
block's frames under the caption of that block. The first third is three blocks, the last third the last three.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashgrpo.distributed.world import single_process
from flashgrpo.models.causal_wan import CausalWan, load_causal_wan
from flashgrpo.models.settings import ModelConfig
from flashgrpo.processes.streaming.cache import KVCache
from flashgrpo.processes.streaming.levels import walk_levels
from flashgrpo.rewards.streams import agreement
from flashgrpo.seeds import normal
from flashgrpo.types import Condition, Prompt
from tools.streaming.build import WEIGHTS, WINDOW
from tools.streaming.world import BLOCK, BLOCKS, FRAMES, Script, draw_scripts, first_video_frame
from tools.tiny.architecture import TEXT_LENGTH
from tools.tiny.world import SIZE, Combination, caption, heldout_combinations

MIDDLE = BLOCKS // 2


def load(folder: Path) -> CausalWan:
    """Load the streaming model for the world's videos."""
    size = {"height": SIZE, "width": SIZE, "num_frames": FRAMES, "max_sequence_length": TEXT_LENGTH}
    return load_causal_wan(ModelConfig(path=str(folder), **size), single_process(), seed=0, window=WINDOW)


def prompts_of(combinations: Sequence[Combination]) -> list[Prompt]:
    """The combinations as prompts."""
    return [Prompt(caption(combination), combination._asdict()) for combination in combinations]


@torch.no_grad()
def draw(model: CausalWan, scripts: Sequence[Script], seed: int) -> Tensor:
    """Draw one video for each script, un-routed; (B, FRAMES, 3, SIZE, SIZE). All scripts switch at the same block."""
    (switch,) = {script.switch for script in scripts}
    conditions = [model.encode(prompts_of([s[which] for s in scripts])) for which in (0, 1)]
    latents, videos, cache, state = [], [], KVCache(), None
    for block in range(BLOCKS):
        condition = conditions[block >= switch]
        if block == switch:
            recent = torch.cat(latents, dim=2)[:, :, -model.window.frames :]
            cache = model.recache(cache, recent, condition)
        latents.append(drawn_block(model, cache, condition, seed, len(scripts)))
        context = cache.context(model.window.past(cache.end))
        cache = model.commit(cache, latents[-1], context, condition)
        frames, state = model.decode(latents[-1], state)
        videos.append(frames)
    return torch.cat(videos, dim=1)


def drawn_block(model: CausalWan, cache: KVCache, condition: Condition, seed: int, rows: int) -> Tensor:
    """Draw the next block of each row, from its named noise."""
    start = cache.end
    context = cache.context(model.window.past(start))
    channels, _, height, width = model.latent_shape
    eps = [
        torch.stack([normal((channels, BLOCK, height, width), seed, "stream", row, start, k) for row in range(rows)])
        for k in range(len(model.levels))
    ]

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return model.velocity(x, sigma, start, context, condition)

    *_, (_, block) = walk_levels(velocity, eps[0], eps[1:], model.levels)
    return block


def rewards(videos: Tensor, scripts: Sequence[Script]) -> Tensor:
    """Agreement of each block's frames with its caption, component by component; (B, BLOCKS, 4)."""
    blocks = []
    for block in range(BLOCKS):
        shown = [s.first if block < s.switch else s.second for s in scripts]
        clip = videos[:, first_video_frame(block) : first_video_frame(block + 1)]
        blocks.append(torch.stack(list(agreement(clip, [caption(c) for c in shown]).values()), dim=-1))
    return torch.stack(blocks, dim=1)


@dataclass(frozen=True)
class Measured:
    """Mean reward of each block, and of the first and the last three."""

    blocks: list[float]
    first: float
    last: float

    @classmethod
    def of(cls, scores: Tensor) -> Measured:
        """Average over videos and components."""
        blocks = scores.mean(dim=(0, 2)).tolist()
        return cls(blocks, sum(blocks[:3]) / 3, sum(blocks[-3:]) / 3)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure the bundled streaming model on held-out captions.")
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=36)
    parser.add_argument("--switched", action="store_true", help="another caption from the middle on")
    parser.add_argument("--save", type=Path, help="write the videos there, as torch saves them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scripts = draw_scripts(heldout_combinations(), options.prompts, 1.0, [MIDDLE], options.seed)
    if not options.switched:
        scripts = [script._replace(switch=BLOCKS) for script in scripts]
    videos = draw(load(options.model), scripts, options.seed)
    if options.save:
        torch.save(videos, options.save)
    scores = rewards(videos, scripts)
    measured = Measured.of(scores)
    print("blocks", " ".join(f"{value:.3f}" for value in measured.blocks))
    print("components", " ".join(f"{value:.3f}" for value in scores.mean(dim=(0, 1)).tolist()))
    print(f"first third {measured.first:.3f}, last third {measured.last:.3f}")


if __name__ == "__main__":
    main()
