"""What the streaming process asks of a model."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flashgrpo.processes.streaming.cache import Context, KVCache
from flashgrpo.processes.streaming.window import Window
from flashgrpo.types import Condition, Latents, LoraStyle, Prompt, Videos


@runtime_checkable
class StreamingModel(Protocol):
    """A model that draws a video block by block from a cache of keys and values; see `models/causal_wan.py`.

    Attributes:
        window: which past frames a block attends to.
        levels: noise levels that a block is drawn at; the first is 1.
        latent_shape: (C, F, H, W) of a whole video.
        stride: video frames of a latent frame, but for the first, which has one.
    """

    window: Window
    levels: tuple[float, ...]
    latent_shape: tuple[int, int, int, int]
    stride: int

    @property
    def network(self) -> nn.Module:
        """The network; its parameters with `requires_grad` are trained."""
        ...

    @property
    def identity(self) -> str:
        """Tells the base weights from others, wherever they lie."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        ...

    @property
    def recomputes(self) -> bool:
        """Whether a backward pass computes the blocks again."""
        ...

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Return a row for each prompt."""
        ...

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text before any are cut off."""
        ...

    def nothing(self) -> Condition:
        """Return a condition of one row, for calls whose result is not used."""
        ...

    def velocity(self, x: Latents, sigma: float, start: int, context: Context | None, condition: Condition) -> Latents:
        """Compute `v = eps - x0` of the block that begins at frame `start`; differentiable."""
        ...

    def commit(self, cache: KVCache, x0: Latents, context: Context | None, condition: Condition) -> KVCache:
        """Return the cache with a finished block behind its last."""
        ...

    def recache(self, cache: KVCache, x0: Latents, condition: Condition) -> KVCache:
        """Return the cache with its last frames, of latents x0, written anew under another prompt."""
        ...

    def decode(self, latents: Latents, state: Any = None) -> tuple[Videos, Any]:
        """Decode the next latent frames, and return what the decoder remembers of them, which has an `expanded`."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Compute as before training inside this context."""
        ...

    def save_lora(self, folder: Path, tensors: Mapping[str, Tensor], style: LoraStyle = "diffusers") -> list[str]:
        """Write adapters as others load them; returns the names of the files."""
        ...

    def save_merged(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the whole model with the trained parameters in it."""
        ...
