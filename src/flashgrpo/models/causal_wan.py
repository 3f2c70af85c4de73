"""Streaming video by a Wan transformer: block after block, from a cache of keys and values, in a few steps.

| checkpoint | how it is loaded |
|---|---|
| a folder of Wan text to video with one transformer, trained to stream | `load_causal_wan(config, ...)` |
| Self-Forcing, LongLive and relatives: one file, beside Wan 2.1's folder | `generator=Path("self_forcing_dmd.pt")` |
| AnyFlow-FAR, whose transformer is Wan's with two times and two sizes of patches | `load_causal_wan(config, ...)` |

A block is drawn from the past frames that its window names (`Window`), or from others: which frames a call attends to
is an argument of the call. The parts are in `models/causal/` and `processes/streaming/`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError
from flashgrpo.models.architectures import Architecture
from flashgrpo.models.causal.checkpoint import GeneratorSource
from flashgrpo.models.causal.decoder import DecoderState, StreamDecoder
from flashgrpo.models.causal.flow_map import FarNetwork
from flashgrpo.models.causal.network import CausalNetwork
from flashgrpo.models.conditions import fingerprint
from flashgrpo.models.families import STREAMING
from flashgrpo.models.load import fast_dtype, find_architecture
from flashgrpo.models.settings import ModelConfig
from flashgrpo.models.source import Source
from flashgrpo.models.wan import WanModel
from flashgrpo.process import PipelineCall
from flashgrpo.processes.streaming.cache import Context, KVCache
from flashgrpo.processes.streaming.levels import shifted_levels
from flashgrpo.processes.streaming.window import Window
from flashgrpo.types import Condition, Latents, LoraStyle, Prompt, Videos

SHIFT = 5.0
WITHOUT = ("compile", "vae_tiling", "vae_slicing", "negative_prompt", "from_image")
"""Settings of a video model that a streaming one has no use for."""


class CausalWan:
    """A `WanModel` whose network is called for blocks of frames. Prompts, adapters and export are the `WanModel`'s.

    Attributes:
        window: which past frames a block attends to.
        levels: noise levels that a block is drawn at, the first is 1.
        latent_shape: (C, F, H, W) of a whole video.
        stride: video frames of a latent frame, but for the first, which has one.
        renoises: whether a prediction is noised again between levels.
        full_frames: last frames before a block that are cached in another way than older ones; 0 where all are alike.
    """

    def __init__(self, wan: WanModel, window: Window, file: Path | None = None) -> None:
        self._wan = wan
        self._file = file
        self.window = window
        is_far = wan.source.architecture.family in STREAMING
        own = wan.pipeline.scheduler.config.shift if is_far else SHIFT
        self.levels = shifted_levels(own if wan.config.shift is None else wan.config.shift)
        self.latent_shape = wan.latent_shape
        self.stride = int(wan.pipeline.vae.config.scale_factor_temporal)
        self._causal: CausalNetwork | FarNetwork
        self._causal = (
            FarNetwork(wan.network, self.levels, wan.dtype) if is_far else CausalNetwork(wan.network, wan.dtype)
        )
        self.renoises = self._causal.renoises
        self.full_frames = self._causal.full_blocks * window.block
        self._decoder = StreamDecoder(wan.pipeline.vae)

    @property
    def network(self) -> nn.Module:
        """The transformer; its parameters with `requires_grad` are trained."""
        return self._wan.network

    @property
    def identity(self) -> str:
        """A digest of samples from the checkpoint's weights."""
        return f"{self._wan.identity}{fingerprint(self._file.parent, [self._file.name], {}) if self._file else ''}"

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._wan.device

    @property
    def vae(self) -> nn.Module:
        """The autoencoder."""
        found: nn.Module = self._wan.pipeline.vae
        return found

    @property
    def offloads(self) -> bool:
        """Whether parts of the model leave the device while others compute."""
        return self._wan.offloads

    @property
    def recomputes(self) -> bool:
        """Whether a backward pass computes the blocks again."""
        return self._wan.recomputes

    # Prompts

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Return a row for each prompt."""
        return self._wan.encode(prompts)

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text before any are cut off."""
        return self._wan.token_counts(texts)

    def nothing(self) -> Condition:
        """Return a condition of one row, for calls whose result is not used."""
        return self._wan.nothing()

    # Blocks

    def velocity(self, x: Latents, sigma: float, start: int, context: Context | None, condition: Condition) -> Latents:
        """Compute the velocity of the block that begins at frame `start`; see `StreamingModel`; differentiable.

        Args:
            x: (B, C, F, H, W), noised to level `sigma`.
            context: of the frames that it attends to, `cache.context(window.past(start))` or any others; one row serves
                all of x, and `Context.stack` gives each its own.
        """
        self._wan.part("transformer")
        return self._causal.velocity(x, sigma, start, context, condition.tensors["text"])

    def commit(self, cache: KVCache, x0: Latents, context: Context | None, condition: Condition) -> KVCache:
        """Return the cache with a finished block behind its last: what it writes at exactly sigma 0, without noise."""
        self._wan.part("transformer")
        return self._causal.commit(cache, x0, context, condition.tensors["text"])

    def recache(self, cache: KVCache, x0: Latents, condition: Condition) -> KVCache:
        """Return the cache with its last frames written anew, under another prompt.

        A block attends, of its window, to the sink and to what is written anew, so nothing but the sink still speaks of
        the old prompt. Positions stay.

        Args:
            x0: (B, C, F, H, W), the latents of the cache's last F frames, whole blocks; `window.frames` as published.
        """
        window, first = self.window, cache.end - x0.shape[2]
        renewed = cache.before(first)
        assert renewed.end == first, f"frame {first} is in the middle of a block"
        for block in x0.split([window.size(f) for f in window.starts(cache.end) if f >= first], dim=2):
            seen = [f for f in self.window.past(renewed.end) if f >= first or f < min(first, self.window.sink)]
            renewed = self.commit(renewed, block, renewed.context(seen), condition)
        return renewed

    def cache_bytes(self, frames: int) -> int:
        """Count the bytes of keys and values of that many latent frames of one video."""
        channels, _, height, width = self.latent_shape
        return self._causal.cache_bytes(frames, self.window.block, (channels, height, width))

    def decode(self, latents: Latents, state: DecoderState | None = None) -> tuple[Videos, DecoderState]:
        """Decode the next latent frames to the next frames (B, F, 3, H, W) in [0, 1]; see `StreamDecoder`."""
        vae: Any = self._wan.part("vae")
        video, state = self._decoder.decode(self._wan.denormalized(latents).to(vae.dtype), state)
        return (video.float() / 2 + 0.5).permute(0, 2, 1, 3, 4).contiguous(), state

    def reference(self) -> AbstractContextManager[None]:
        """Compute as before training inside this context."""
        return self._wan.reference()

    # Getting the result out

    def pipeline_call(self, given: Mapping[str, Any]) -> PipelineCall | None:
        """Return AnyFlow-FAR's pipeline with its blocks and levels; Wan's own does not draw block by block."""
        if self.renoises:
            return None
        blocks = [self.window.size(frame) for frame in self.window.starts(self.latent_shape[1])]
        levels = {"num_inference_steps": len(self.levels), "guidance_scale": 1.0}
        return self._wan.pipeline_call({**given, **levels, "chunk_partition": blocks})

    def save_lora(self, folder: Path, tensors: Mapping[str, Tensor], style: LoraStyle = "diffusers") -> list[str]:
        """Write adapters as `WanPipeline.load_lora_weights` reads them, or as ComfyUI does."""
        return self._wan.save_lora(folder, tensors, style)

    def save_merged(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the pipeline with the trained parameters in it."""
        self._wan.save_merged(folder, tensors)


def load_causal_wan(
    config: ModelConfig,
    world: World,
    seed: int,
    prompts: Sequence[Prompt] = (),
    keep_reference: bool = False,
    say: Callable[[str], None] | None = None,
    window: Window | None = None,
    generator: Path | None = None,
) -> CausalWan:
    """Load a Wan folder as a streaming model and prepare its network for training as `config.train` says.

    Args:
        generator: a file with the transformer's weights, which the folder's own are left aside for.

    Raises:
        UserError: the checkpoint is not one that streams, its files are not whole, or a setting has no effect.
    """
    window = window or Window()
    if config.vae_dtype == "auto":
        config = config.model_copy(update={"vae_dtype": fast_dtype(world.device)})
    architecture, folder = find_architecture(config)
    _check(config, world, window, architecture, generator)
    source: Source
    if generator is not None and not config.random_init:
        source = GeneratorSource(architecture, folder, config, generator)
    else:
        empty = world.device.type == "meta"
        source = Source(architecture, None if config.random_init else folder, config, empty=empty)
    wan = WanModel(source, config, world, seed, prompts, keep_reference, say)
    if window.whole(frames := wan.latent_shape[1]) != frames:
        near = [window.next_start(frames), window.whole(frames)]
        nearest = min((end for end in near if end), key=lambda end: abs(end - frames))
        fits = 1 + (nearest - 1) * wan.pipeline.vae.config.scale_factor_temporal
        behind = f" behind one of {window.first}" if window.first else ""
        raise UserError(
            f"model.num_frames: {config.num_frames} are {frames} latent frames, no whole blocks of {window.block}"
            f"{behind}; the nearest that fits is {fits}"
        )
    return CausalWan(wan, window, generator)


def _check(
    config: ModelConfig, world: World, window: Window, architecture: Architecture, generator: Path | None
) -> None:
    """Refuse what does not stream, before anything is loaded."""
    for name in WITHOUT:
        if getattr(config, name) != ModelConfig.model_fields[name].default:
            raise UserError(f"model.{name}: a streaming model has no use for it; leave it out")
    if world.context > 1:
        raise UserError("parallel.context: a streaming model's blocks are too short to be split; leave it out")
    several = architecture.has("transformer_2") or architecture.settings.get("expand_timesteps")
    if architecture.family not in ("WanPipeline", *STREAMING) or several:
        names = ", ".join(family.name for family in STREAMING.values())
        raise UserError(
            f"model.path: {config.path} does not stream; Wan text-to-video with one transformer does, and {names}"
        )
    if generator is not None and architecture.family in STREAMING:
        raise UserError(f"model.generator: {config.path} has a generator of its own; leave it out")
    if architecture.family in STREAMING:
        _check_blocks(config, window, architecture.of("transformer"))


def _check_blocks(config: ModelConfig, window: Window, settings: Mapping[str, Any]) -> None:
    """Refuse blocks that AnyFlow-FAR was not trained to draw, and a window that does not hold what it keeps in full."""
    if config.shift is not None:
        raise UserError(f"model.shift: {config.path} is drawn at the levels of its own scheduler; leave it out")
    blocks, limit = list(settings.get("chunk_partition", (1, 3))), settings.get("full_chunk_limit", 3)
    first, block, *others = [*blocks, 0, 0] if len(blocks) < 2 else blocks
    if not 0 < first <= block or {*others[:-1]} - {block} or limit < 2:
        raise UserError(
            f"model.path: {config.path} draws blocks of {blocks} latent frames and keeps {limit} of them in full; "
            "a short first one and then equal ones are supported, and 2 or more"
        )
    if (window.size(0), window.block) != (first, block):
        raise UserError(
            f"rollout.first_block: {config.path} was trained to draw {first} latent frame and then {block} at a time; "
            f"set rollout.first_block={first} rollout.block={block}"
        )
    if window.local < limit * block:
        raise UserError(
            f"rollout.local: {config.path} keeps its last frames in full, with the block's own {limit * block}; "
            "the window is that long or longer"
        )
