"""diffusers' AnyFlow-FAR transformer called for blocks of frames, with other self-attention and another rope.

The network itself is as it was (arXiv 2605.13724). It predicts a mean velocity `u(x, t, r)`, by which a straight line
leads from level t to r. Blocks look at the last ones in full, and at older ones in patches of four times the size: when
a block is finished, those behind it are written again as that makes them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_anyflow_far import apply_rotary_emb
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flashgrpo.models.causal.network import TRAINING_TIMESTEPS, BlockAttention, Written, bytes_of_token, tokens_of
from flashgrpo.processes.streaming.cache import CachedBlock, Context, KVCache
from flashgrpo.types import Latents

FILLED = 128
"""A block that is drawn attends to zeros, too: as many as fill its tokens up to a multiple of this. Diffusers' sampling
does so, since flex attention wants whole tiles; in writing a cache and in training its masks leave them out."""


@dataclass(frozen=True)
class FarCall:
    """What one call of the network is about.

    Args:
        start: the first frame.
        whole: the first frame that is not in large patches.
        context: past frames to attend to.
        pieces: tokens of each block, where finished blocks are written; each attends to itself and to those before it.
        written: layer -> its keys and values.
    """

    start: int
    whole: int
    context: Context | None
    pieces: Sequence[int] = ()
    written: Written | None = None


class FarRope(nn.Module):
    """The network's rope for frames at any positions; the call goes with its result into every block."""

    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.rope = rope
        self.call: FarCall | None = None

    def forward(self, far_cfg: dict[str, Any], device: torch.device, **_: Any) -> dict[str, Any]:
        """Return the rotations (1, 1, L, head_dim / 2) of queries and keys, and the call."""
        call = self.call
        assert call is not None, "this network is called for blocks of frames"
        large, whole = range(call.start, call.whole), range(call.whole, call.start + far_cfg["total_frames"])
        parts = [self._turned(frames, far_cfg, frames is large, device) for frames in (large, whole) if frames]
        turned = torch.cat(parts, dim=2)
        return {"query": turned, "key": turned, "call": call}

    def _turned(self, frames: range, far_cfg: dict[str, Any], large: bool, device: torch.device) -> Tensor:
        """Return the rotations of some frames: in height and width those of the network's first, in time their own."""
        first = self.rope({**far_cfg, "total_frames": 1, "num_compressed_frames": int(large)}, device)["query"]
        numbers = self.rope.attention_head_dim // 2 - 2 * (self.rope.attention_head_dim // 6)
        positions = torch.arange(frames.start, frames.stop, device=device)
        how = {"use_real": False, "repeat_interleave_real": False, "freqs_dtype": torch.float64}
        time = get_1d_rotary_pos_embed(2 * numbers, positions, self.rope.theta, **how)
        time = time.repeat_interleave(first.shape[2], dim=0)[None, None]
        return torch.cat([time, first[..., numbers:].repeat(1, 1, len(frames), 1)], dim=-1)


class FarAttention(BlockAttention):
    """Attends to the context of the call, to the call's own tokens, and in drawing to zeros."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Any = None,
        rotary_emb: dict[str, Any] | None = None,
    ) -> Tensor:
        """Project, normalise, rotate, write, look back, attend."""
        assert rotary_emb is not None
        call, heads, dtype = rotary_emb["call"], (attn.heads, -1), hidden_states.dtype
        query, key = (
            apply_rotary_emb(norm(project(hidden_states)).to(dtype).unflatten(2, heads).transpose(1, 2), turn)
            for project, norm, turn in (
                (attn.to_q, attn.norm_q, rotary_emb["query"]),
                (attn.to_k, attn.norm_k, rotary_emb["key"]),
            )
        )
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        value = attn.to_v(hidden_states).unflatten(2, heads)
        if call.written is not None:
            call.written[self.layer] = key, value
        key, value = self.behind(call.context, key, value)
        attended, first, before = list[Tensor](), 0, key.shape[1] - query.shape[1]
        for size in call.pieces or (query.shape[1],):
            stop = before + first + size
            zeros = 0 if call.pieces else -size % FILLED
            attended.append(self._attend(query[:, first : first + size], key[:, :stop], value[:, :stop], zeros))
            first += size
        joined = torch.cat(attended, dim=1).flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](joined))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, zeros: int) -> Tensor:
        """Attend to all keys, and to so many that are zero and have the value zero."""
        if zeros:
            key, value = (F.pad(tensor, (0, 0, 0, 0, 0, zeros)) for tensor in (key, value))
        return dispatch_attention_fn(query, key, value, backend=self._attention_backend)


def pieces_of(written: Written, sizes: Sequence[int]) -> list[Context]:
    """Cut what the layers have written into pieces of so many tokens, each in memory of its own; empties `written`."""
    keys, values = ([list[Tensor]() for _ in sizes] for _ in range(2))
    for layer in sorted(written):
        for side, whole in zip((keys, values), written.pop(layer), strict=True):
            for pieces, piece in zip(side, whole.split(list(sizes), dim=1), strict=True):
                pieces.append(piece.clone())
    return [Context(tuple(one), tuple(other)) for one, other in zip(keys, values, strict=True)]


class FarNetwork:
    """Calls of an AnyFlow-FAR transformer for blocks of frames.

    Args:
        network: an `AnyFlowFARTransformer3DModel`, which this gives other self-attention processors and another rope.
        levels: noise levels that a block is drawn at.
        dtype: that its inputs are cast to.
    """

    renoises = False

    def __init__(self, network: Any, levels: Sequence[float], dtype: torch.dtype = torch.float32) -> None:
        self.network = network
        self.dtype = dtype
        self._below = dict(zip(levels, (*levels[1:], 0.0), strict=True))
        self._rope = FarRope(network.rope)
        network.rope = self._rope
        for layer, block in enumerate(network.blocks):
            backend = block.attn2.processor._attention_backend  # self-attention's own is flex
            block.attn1.set_processor(FarAttention(layer, backend))

    @property
    def positions(self) -> int:
        """Frames of the longest video that the network has positions for."""
        return int(self._rope.rope.max_seq_len)

    @property
    def full_blocks(self) -> int:
        """Finished blocks that the next one looks at in full: the last ones, which are written again behind it."""
        return int(self.network.config.full_chunk_limit) - 1

    def velocity(
        self,
        x: Latents,
        sigma: float,
        start: int,
        context: Context | None,
        text: Float[Tensor, "batch length text_dim"],
    ) -> Latents:
        """Compute the mean velocity from level `sigma` to the next, of a block at frame `start`; differentiable."""
        assert start + x.shape[2] <= self.positions, f"frame {start + x.shape[2] - 1} has no position"
        call = FarCall(start, start, context)
        v: Tensor = self._called(call, x, sigma, self._below[sigma], [x.shape[2]], False, text)
        return v.transpose(1, 2).float()

    @torch.no_grad()
    def commit(self, cache: KVCache, x0: Latents, context: Context | None, text: Tensor) -> KVCache:
        """Return the cache with a finished block, and with those behind it written again, at exactly level 0.

        All that is written attends to what the finished block attended to, of the frames before it; the finished block
        attends to those that are written with it, too, which a window that holds them has in its context anyway.
        """
        assert context is None or context.frames, "a context says which frames it is of"
        count = max(0, len(cache.blocks) - self.full_blocks)
        while count < len(cache.blocks) and cache.blocks[count].latents is None:
            count += 1  # in large patches already
        older, again = KVCache(cache.blocks[:count]), cache.blocks[count:]
        past = [block.latents.expand(len(x0), -1, -1, -1, -1) for block in again if block.latents is not None]
        blocks = [*past, x0]
        begins = [block.frames.start for block in again] + [cache.end]
        seen = context.frames if context is not None else ((),)
        large = max(0, len(blocks) - self.full_blocks)
        written: Written = {}
        sizes = self._tokens(x0, [block.shape[2] for block in blocks], large)
        call = FarCall(
            begins[0],
            begins[large],
            older.contexts([[frame for frame in row if frame < begins[0]] for row in seen]),
            sizes,
            written,
        )
        self._called(call, torch.cat(blocks, dim=2), 0.0, 0.0, [block.shape[2] for block in blocks], True, text)
        parts = pieces_of(written, sizes)
        made = (
            CachedBlock(range(first, first + block.shape[2]), part, None if number < large else block)
            for number, (first, block, part) in enumerate(zip(begins, blocks, parts, strict=True))
        )
        return KVCache((*older.blocks, *made))

    def _tokens(self, x0: Latents, frames: Sequence[int], large: int) -> list[int]:
        """Return how many tokens the blocks have, of which the first `large` are in large patches."""
        config, shape = self.network.config, x0.shape[1:2] + x0.shape[3:]
        patches = [config.compressed_patch_size if i < large else config.patch_size for i in range(len(frames))]
        return [count * tokens_of(patch, shape) for count, patch in zip(frames, patches, strict=True)]

    def cache_bytes(self, frames: int, block: int, shape: tuple[int, int, int]) -> int:
        """Count the bytes that a cache keeps of so many frames of one video; see `CausalNetwork`."""
        config, whole = self.network.config, min(frames, self.full_blocks * block)
        small, large = (tokens_of(patch, shape) for patch in (config.patch_size, config.compressed_patch_size))
        keys_and_values = (whole * small + (frames - whole) * large) * bytes_of_token(self.network, self.dtype)
        return keys_and_values + whole * math.prod(shape) * 4  # and latents, to write them again from

    def _called(
        self, call: FarCall, x: Latents, t: float, r: float, blocks: list[int], writes: bool, text: Tensor
    ) -> Any:
        self._rope.call = call
        times = [TRAINING_TIMESTEPS * x.new_full((x.shape[0], x.shape[2]), level) for level in (t, r)]
        try:
            return self.network(
                x.transpose(1, 2).to(self.dtype),
                *times,
                text.to(self.dtype),
                blocks,
                kv_cache=(None,) * len(self.network.blocks),  # which keeps its own forward from masks
                kv_cache_flag={"num_cached_chunks": 0, "is_cache_step": writes},
                attention_mask=(),
                return_dict=False,
            )[0]
        finally:
            self._rope.call = None
