"""diffusers' Wan transformer made causal, cached and routable: a processor for its self-attention, and its rope.

The network itself is as it was. Its rope hands every block the positions' rotation, and beside it what the call is to
attend to and where its keys and values are to go (`Call`), so blocks that are computed again for a backward pass find
what they had.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from jaxtyping import Bool, Float
from torch import Tensor, nn

from flashgrpo.processes.streaming.cache import CachedBlock, Context, KVCache
from flashgrpo.types import Latents

Written = dict[int, tuple[Tensor, Tensor]]
TRAINING_TIMESTEPS = 1000


@dataclass(frozen=True)
class Call:
    """What one call of the network is about.

    Args:
        positions: (F,) of the frames in the video.
        context: past frames to attend to.
        written: layer -> its keys and values, filled in where it is given.
        mask: (L, L), true where a token (row) may attend to a token (column); all may where it is None.
    """

    positions: Tensor
    context: Context | None = None
    written: Written | None = None
    mask: Bool[Tensor, "tokens tokens"] | None = None


class CallRope(nn.Module):
    """The network's rope for frames at any positions; the call goes with its result into every block."""

    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.rope = rope
        self.call: Call | None = None

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        """Return cos, sin (1, L, 1, head_dim) and the call. Without a call frames are those from 0 on."""
        cos, sin = self.rope(x)
        call, time = self.call, self.rope.t_dim
        if call is None:
            return cos, sin, None
        per_frame = cos.shape[1] // len(call.positions)
        tables = (self.rope.freqs_cos, self.rope.freqs_sin)
        rows = [table[call.positions, :time].repeat_interleave(per_frame, 0)[None, :, None] for table in tables]
        cos, sin = (torch.cat([row, old[..., time:]], dim=-1) for row, old in zip(rows, (cos, sin), strict=True))
        return cos, sin, call


class BlockAttention:
    """A processor of self-attention, which knows its layer and looks back."""

    def __init__(self, layer: int, backend: Any = None) -> None:
        self.layer = layer
        self._attention_backend = backend  # diffusers' names
        self._parallel_config = None

    def behind(self, context: Context | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, L, heads, head_dim) with those of the context before them."""
        if context is None:
            return key, value
        old_key, old_value = (side[self.layer].expand(len(key), -1, -1, -1) for side in (context.keys, context.values))
        return torch.cat([old_key, key], dim=1), torch.cat([old_value, value], dim=1)


class CausalAttention(BlockAttention):
    """Attends to the context of the call and to the call's own tokens."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Any, ...] = (),
    ) -> Tensor:
        """Project, normalise, rotate, write, look back, attend."""
        cos, sin, call = rotary_emb
        heads = (attn.heads, -1)
        query = rotated(attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads), cos, sin)
        key = rotated(attn.norm_k(attn.to_k(hidden_states)).unflatten(2, heads), cos, sin)
        value = attn.to_v(hidden_states).unflatten(2, heads)
        if call is not None and call.written is not None:
            call.written[self.layer] = key, value
        key, value = self.behind(None if call is None else call.context, key, value)
        mask = None if call is None else call.mask
        attended = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)
        attended = attended.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](attended))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of values, as Wan does: (a, b) -> (a cos - b sin, a sin + b cos)."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(-2).type_as(x)


def context_of(written: Written) -> Context:
    """Return what the layers of a call have written, in their order."""
    keys, values = zip(*(written[layer] for layer in sorted(written)), strict=True)
    return Context(keys, values)


def tokens_of(patch: Sequence[int], shape: Sequence[int]) -> int:
    """Count the tokens of a latent frame (C, H, W)."""
    return int((shape[1] // patch[1]) * (shape[2] // patch[2]))


def bytes_of_token(network: Any, dtype: torch.dtype) -> int:
    """Count the bytes of a token's keys and values in all layers."""
    sizes = network.config
    return int(2 * sizes.num_layers * sizes.num_attention_heads * sizes.attention_head_dim * dtype.itemsize)


class CausalNetwork:
    """Calls of a Wan transformer for blocks of frames.

    Args:
        network: a `WanTransformer3DModel`, which this gives other self-attention processors and another rope.
        dtype: that its inputs are cast to.

    Attributes:
        renoises: whether a prediction is noised again between levels.
        full_blocks: last finished blocks that are cached in another way than older ones.
    """

    renoises, full_blocks = True, 0

    def __init__(self, network: Any, dtype: torch.dtype = torch.float32) -> None:
        self.network = network
        self.dtype = dtype
        self._rope = CallRope(network.rope)
        network.rope = self._rope
        for layer, block in enumerate(network.blocks):
            backend = block.attn1.processor._attention_backend
            block.attn1.set_processor(CausalAttention(layer, backend))

    @property
    def positions(self) -> int:
        """Frames of the longest video that the network has positions for."""
        return int(self._rope.rope.max_seq_len)

    def velocity(
        self,
        x: Latents,
        sigma: float,
        start: int,
        context: Context | None,
        text: Float[Tensor, "batch length text_dim"],
    ) -> Latents:
        """Compute `v = eps - x0` of a block whose first frame is `start`; differentiable.

        Args:
            x: (B, C, F, H, W) at noise level `sigma`, the same in all rows.
            context: of the past frames that it attends to; None of the first block.
        """
        assert start + x.shape[2] <= self.positions, f"frame {start + x.shape[2] - 1} has no position"
        positions = torch.arange(start, start + x.shape[2], device=x.device)
        return self._called(Call(positions, context), x, torch.full((len(x),), sigma, device=x.device), text)

    @torch.no_grad()
    def commit(self, cache: KVCache, x0: Latents, context: Context | None, text: Tensor) -> KVCache:
        """Return the cache with a finished block, run once more at exactly sigma 0 and without noise."""
        frames = range(cache.end, cache.end + x0.shape[2])
        positions = torch.arange(frames.start, frames.stop, device=x0.device)
        written: Written = {}
        self._called(Call(positions, context, written), x0, torch.zeros(len(x0), device=x0.device), text)
        return cache.append(CachedBlock(frames, context_of(written)))

    def cache_bytes(self, frames: int, block: int, shape: tuple[int, int, int]) -> int:
        """Count the bytes that a cache keeps of so many frames of one video.

        Args:
            block: frames of a block.
            shape: (C, H, W) of a latent frame.
        """
        return frames * tokens_of(self.network.config.patch_size, shape) * bytes_of_token(self.network, self.dtype)

    def masked(
        self,
        x: Latents,
        sigma: Float[Tensor, "batch frames"],
        positions: Tensor,
        mask: Bool[Tensor, "frames frames"],
        text: Tensor,
    ) -> Latents:
        """Compute the velocity of many frames in one pass, each at a noise level of its own; differentiable.

        What training wants: with a block-causal mask this is what `velocity` gives block by block.

        Args:
            mask: true where a frame (row) attends to a frame (column).
        """
        per_frame = tokens_of(self.network.config.patch_size, x.shape[1:2] + x.shape[3:])
        tokens = mask.repeat_interleave(per_frame, 0).repeat_interleave(per_frame, 1)
        return self._called(Call(positions, mask=tokens), x, sigma.repeat_interleave(per_frame, 1), text)

    def _called(self, call: Call, x: Latents, sigma: Tensor, text: Tensor) -> Latents:
        self._rope.call = call
        try:
            timestep = TRAINING_TIMESTEPS * sigma
            v: Tensor = self.network(x.to(self.dtype), timestep, text.to(self.dtype), return_dict=False)[0]
        finally:
            self._rope.call = None
        return v.float()
