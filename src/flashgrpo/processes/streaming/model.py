"""What the streaming process asks of a model."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from flashgrpo.process import PipelineCall
from flashgrpo.processes.of_model import Model
from flashgrpo.processes.streaming.cache import Context, KVCache
from flashgrpo.processes.streaming.window import Window
from flashgrpo.types import Condition, Latents, Videos


@runtime_checkable
class StreamingModel(Model, Protocol):
    """A model that draws a video block by block from a cache of keys and values; see `models/causal_wan.py`.

    Attributes:
        window: which past frames a block attends to.
        levels: noise levels that a block is drawn at; the first is 1.
        latent_shape: (C, F, H, W) of a whole video.
        stride: video frames of a latent frame, but for the first, which has one.
        renoises: whether a prediction is noised again between levels; otherwise a straight line leads to the next one.
    """

    renoises: bool
    window: Window
    levels: tuple[float, ...]
    latent_shape: tuple[int, int, int, int]
    stride: int

    def velocity(self, x: Latents, sigma: float, start: int, context: Context | None, condition: Condition) -> Latents:
        """Compute the velocity of the block that begins at frame `start`, `sigma` one of the levels; differentiable.

        `x - sigma v` is where it leads: `v = eps - x0` or, without noise between levels, the mean to the next one.
        """
        ...

    def commit(self, cache: KVCache, x0: Latents, context: Context | None, condition: Condition) -> KVCache:
        """Return the cache with a finished block behind its last."""
        ...

    def recache(self, cache: KVCache, x0: Latents, condition: Condition) -> KVCache:
        """Return the cache with its last frames, of latents x0, written anew under another prompt."""
        ...

    def pipeline_call(self, given: Mapping[str, Any]) -> PipelineCall | None:
        """Return how a program draws a video block by block; None where diffusers has no pipeline that does."""
        ...

    def decode(self, latents: Latents, state: Any = None) -> tuple[Videos, Any]:
        """Decode the next latent frames, and return what the decoder remembers of them, which has an `expanded`."""
        ...
