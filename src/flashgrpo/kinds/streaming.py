"""Streaming models of videos: `processes/streaming`."""

import math
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashgrpo.config import RunConfig
from flashgrpo.distributed.live import LiveBytes, highest, size_of
from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError
from flashgrpo.files import resolve_path
from flashgrpo.models.causal_wan import CausalWan, load_causal_wan
from flashgrpo.models.load import META, Say
from flashgrpo.models.settings import ModelConfig
from flashgrpo.process import Cost
from flashgrpo.processes.streaming.cache import KVCache
from flashgrpo.processes.streaming.cost import drawn_until, recorded_blocks, update_cost
from flashgrpo.processes.streaming.process import StreamingProcess
from flashgrpo.processes.streaming.scenes import scenes_of, texts_of
from flashgrpo.processes.streaming.settings import OneLevel, Routing, StreamExplore, StreamRollout, StreamScore
from flashgrpo.processes.streaming.window import Window
from flashgrpo.types import Condition, Prompt


def make_process(
    config: RunConfig, world: World, prompts: Sequence[Prompt], say: Say | None = None
) -> StreamingProcess:
    """Load the model of a run, with the process that draws from it; see `Kind`."""
    rollout, credit = _rollout(config), config.algorithm.credit
    keep = config.algorithm.objective.needs_reference
    every = [scene for prompt in prompts for scene in texts_of(prompt)]
    generator = config.model.generator and Path(resolve_path(config.model.generator))
    model = load_causal_wan(config.model, world, config.seed, every, keep, say, rollout.window, generator or None)
    _check_explorer(config, model)
    for prompt in prompts:  # a switch that cannot be is refused before anything is drawn
        scenes_of(prompt, model.latent_shape[1], rollout.window, model.stride)
    batch, whole = config.optim.micro_batch, _whole(config)
    return StreamingProcess(model, *_chosen(config), rollout, batch, credit.anchored, whole, world)


def planned_cost(config: RunConfig, update: int) -> Cost:
    """Return what an update will cost, before weights are loaded."""
    model = _weightless(config.model, _rollout(config).window)
    _check_explorer(config, model)
    return update_cost(
        *_chosen(config),
        _rollout(config),
        model.latent_shape[1],
        len(model.levels),
        config.algorithm.credit.anchored,
        _whole(config),
        config.seed,
        update,
        config.optim.passes,
        config.algorithm.objective.columns,
        config.uses,
        config.model.gradient_checkpointing,
    )


@lru_cache(maxsize=8)
def _weightless(model: ModelConfig, window: Window) -> CausalWan:
    return load_causal_wan(model.weightless(), World(META), seed=0, window=window)


class StreamMemory:
    """What a streaming model takes, counted on its full size without weights; see `Memory`."""

    further_weights = 0

    def __init__(self, config: RunConfig) -> None:
        self._config, self._rollout = config, _rollout(config)
        self._explore, self._score = _chosen(config)
        self._model: Any = _weightless(config.model, self._rollout.window)
        self.network: nn.Module = self._model.network
        self.networks: Sequence[nn.Module] = [self.network]
        self.decoder: nn.Module = self._model.vae
        self._call = cache(self._count_call)

    @property
    def sample(self) -> float:
        """Bytes of a sample that has been drawn: its latents and its condition."""
        return float(math.prod(self._model.latent_shape) * 4 + size_of(self._model.nothing().tensors.values()))

    def kept(self, samples: int) -> Mapping[str, int]:
        """Count the latents, what is recorded of them, and the keys and values at the forks of their groups."""
        model, rollout = self._model, self._rollout
        of_block = math.prod(model.latent_shape) * 4 * rollout.block // model.latent_shape[1]
        blocks = recorded_blocks(self._explore, len(model.levels))
        return {
            "samples": round(samples * (self.sample + of_block * blocks)),
            "keys and values": self._groups(samples) * self._kept,
        }

    def _groups(self, samples: int) -> int:
        return -(-samples // (self._rollout.group_size + self._config.algorithm.credit.anchored))

    @property
    def _kept(self) -> int:
        """Count the keys and values at the fork of a group, at most."""
        model, window = self._model, self._rollout.window
        places = self._explore.places(model.latent_shape[1], window, len(model.levels))
        return int(model.cache_bytes(max(window.kept(frame) for frame, _ in places)))

    def drawing(self, samples: int) -> int:
        """Count a call on a micro-batch of branches, the frames before the fork, and what each remembers behind."""
        rows, model = min(samples, self._rollout.micro_batch, self._rollout.group_size), self._model
        frames, block, window = model.latent_shape[1], self._rollout.block, self._rollout.window
        places = self._explore.places(frames, window, len(model.levels))
        whole = _whole(self._config)
        behind = max(drawn_until(frame, self._explore, block, frames, whole) - frame for frame, _ in places) - block
        remembered = self._remembered(self._explore.remembered)
        return self._call(rows) + remembered + rows * min(model.cache_bytes(behind), remembered)

    def update(self, samples: int) -> int:
        """Count a replay of a micro-batch with its backward pass, and the keys and values that its branches write.

        Units of several groups, where a micro-batch has some, have a cache each, beside those that are kept.
        """
        rows, model = min(samples, self._config.optim.micro_batch, self._rollout.group_size), self._model
        several = self._groups(samples) > 1 and self._rollout.group_size % rows > 0
        behind = model.cache_bytes((self._explore.blocks - 1) * self._rollout.block)
        return self._call(rows, backward=True) + rows * (behind + several * self._kept)

    def sampling(self, samples: int) -> int:
        """Count a call on a micro-batch of an evaluation, with the frames that each remembers."""
        rows = min(samples, self._rollout.micro_batch)
        return self._call(rows) + rows * self._remembered(0)

    def _remembered(self, more: int) -> int:
        """Count the keys and values of a video while it is drawn, of which so many last frames may be looked at."""
        frames = max(self._rollout.window.frames, more) + self._rollout.block
        return int(self._model.cache_bytes(min(frames, self._model.latent_shape[1])))

    def decoding(self, samples: int) -> int:
        """Count decoding a micro-batch, whose videos are whole on the device."""
        rows, model = min(samples, self._rollout.decode_micro_batch), self._model
        latents = torch.zeros(rows, *model.latent_shape, device=META)
        return highest(lambda: model.decode(latents), self.decoder.parameters())

    def _count_call(self, rows: int, backward: bool = False) -> int:
        """Count drawing, or scoring, a block of rows that attend to a whole window each, and caching it."""
        model, window = self._model, self._rollout.window
        channels, frames, height, width = model.latent_shape
        x = torch.zeros(rows, channels, window.block, height, width, device=META)
        condition = Condition({n: t.expand(rows, *t.shape[1:]) for n, t in model.nothing().tensors.items()})
        cache, last = KVCache(), window.starts(frames)[-1]
        with LiveBytes():  # whose layers are alike and are made once
            while cache.end < min(last, window.next_start(window.frames)):
                block = x[:, :, : window.size(cache.end)]
                cache = model.commit(cache, block, cache.context(window.past(cache.end)), condition)

        def call() -> None:
            context = cache.context(window.past(cache.end))
            v = model.velocity(x, 1.0, cache.end, context, condition)
            if backward:
                v.square().mean().backward()
            del v
            model.commit(cache, x, context, condition)

        written = [layer for block in cache.blocks for layer in (*block.written.keys, *block.written.values)]
        latents = [block.latents for block in cache.blocks if block.latents is not None]
        outside = [*self.network.parameters(), x, *condition.tensors.values(), *written, *latents]
        return highest(call, outside, backward)


memory = StreamMemory


def _rollout(config: RunConfig) -> StreamRollout:
    assert isinstance(config.rollout, StreamRollout)
    return config.rollout


def _check_explorer(config: RunConfig, model: CausalWan) -> None:
    """Refuse an explorer that a model gives nothing to explore, or one whose branches would see unlike past."""
    explore, path = config.algorithm.explore, config.model.path
    if isinstance(explore, OneLevel) and not model.renoises:
        raise UserError(
            f"algorithm.explore: {path} draws a block without noise between its levels, so one-level has nothing to "
            "draw; take algorithm.explore.kind=routing (preset kvpo)"
        )
    if isinstance(explore, Routing) and explore.nearest < (least := model.full_frames + model.window.block):
        raise UserError(
            f"algorithm.explore.nearest: {path} looks at its last {model.full_frames} frames in full and at older "
            f"ones in large patches, which alone may be routed; with the block's own {least} or more"
        )


def _whole(config: RunConfig) -> bool:
    """Return whether a reward that is trained on looks at more than the blocks in which branches differ."""
    return any(reward.looks_at != "chunk" for reward in config.rewards.values() if not reward.watched)


def _chosen(config: RunConfig) -> tuple[StreamExplore, StreamScore]:
    explore, score = config.algorithm.explore, config.algorithm.score
    assert isinstance(explore, StreamExplore)
    assert isinstance(score, StreamScore)
    return explore, score
