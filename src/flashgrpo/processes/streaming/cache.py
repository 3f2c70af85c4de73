"""Keys and values of the frames that are drawn already: kept by block, shared by branches, looked at by frame."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flashgrpo.types import Latents

KeysOrValues = Float[Tensor, "batch tokens heads head_dim"]


@dataclass(frozen=True)
class Context:
    """Keys and values of some frames, (B, L, heads, head_dim) for each layer: what a block attends to beside itself.

    One row serves a batch of any size. Keys have their positions in them (rope).

    Args:
        frames: which frames they are of, for each row, where that is known.
    """

    keys: tuple[KeysOrValues, ...]
    values: tuple[KeysOrValues, ...]
    frames: tuple[tuple[int, ...], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def row(self, number: int) -> "Context":
        """Return that of one row; where there is but one, of that."""
        rows = slice(None) if len(self.keys[0]) == 1 else slice(number, number + 1)
        keys, values = (tuple(layer[rows] for layer in side) for side in (self.keys, self.values))
        return Context(keys, values, self.frames[rows] if len(self.frames) > 1 else self.frames)

    @staticmethod
    def stack(contexts: Sequence["Context"]) -> "Context":
        """Join contexts of equal length along the batch: a row for each branch."""
        return Context(
            tuple(torch.cat(layer) for layer in zip(*(context.keys for context in contexts), strict=True)),
            tuple(torch.cat(layer) for layer in zip(*(context.values for context in contexts), strict=True)),
            tuple(frames for context in contexts for frames in context.frames),
        )


@dataclass(frozen=True)
class CachedBlock:
    """The keys and values that one finished block wrote, layer by layer, and the frames that it is.

    Args:
        latents: (B, C, F, H, W) of the block, where it will be written again.
    """

    frames: range
    written: Context
    latents: Latents | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.written.nbytes + (0 if self.latents is None else self.latents.nbytes)

    def row(self, number: int) -> "CachedBlock":
        """Return that of one row; where there is but one, of that."""
        latents = self.latents
        if latents is not None and len(latents) > 1:
            latents = latents[number : number + 1]
        return CachedBlock(self.frames, self.written.row(number), latents)

    @staticmethod
    def stack(blocks: Sequence["CachedBlock"]) -> "CachedBlock":
        """Join blocks of the same frames along the batch."""
        latents = [block.latents for block in blocks if block.latents is not None]
        joined = torch.cat(latents) if latents else None
        return CachedBlock(blocks[0].frames, Context.stack([block.written for block in blocks]), joined)


@dataclass(frozen=True)
class KVCache:
    """The finished blocks of a video, or of a batch of videos, in order. It never changes: each method gives another.

    So a fork costs nothing. Branches begin with the same cache and append blocks of their own, and the prefix's tensors
    are those of all. A prefix of one row goes before blocks of many.
    """

    blocks: tuple[CachedBlock, ...] = ()

    @property
    def end(self) -> int:
        """The frame that the next block begins at."""
        return self.blocks[-1].frames.stop if self.blocks else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; those that several caches share are counted in each."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def rows(self) -> int:
        """Videos that it is of; 1 also where it serves a batch of any size."""
        return max((len(block.written.keys[0]) for block in self.blocks), default=1)

    def row(self, number: int) -> "KVCache":
        """Return the cache of one video."""
        return KVCache(tuple(block.row(number) for block in self.blocks))

    @staticmethod
    def stack(caches: Sequence["KVCache"]) -> "KVCache":
        """Join caches of one row and the same frames along the batch; one of which all are the same serves as it is."""
        if all(cache is caches[0] for cache in caches):
            return caches[0]
        return KVCache(tuple(map(CachedBlock.stack, zip(*(cache.blocks for cache in caches), strict=True))))

    def append(self, block: CachedBlock) -> "KVCache":
        """Return the cache with one block more, which begins where the last one ends."""
        assert block.frames.start == self.end, f"a block at frame {block.frames.start} behind frame {self.end}"
        return KVCache((*self.blocks, block))

    def before(self, frame: int) -> "KVCache":
        """Return the cache of the blocks that end at `frame` or earlier."""
        return KVCache(tuple(block for block in self.blocks if block.frames.stop <= frame))

    def only(self, frames: Sequence[int]) -> "KVCache":
        """Return the cache of the blocks that hold one of these frames, and of the last: the others are forgotten."""
        wanted = set(frames)
        last = self.blocks[-1:]
        return KVCache(tuple(block for block in self.blocks if block in last or wanted.intersection(block.frames)))

    def context(self, frames: Sequence[int]) -> Context | None:
        """Return the keys and values of these frames, in this order; None of no frames.

        Each tensor is copied once, here, and the calls of a block share it.

        Raises:
            KeyError: a frame is not in the cache.
        """
        if not frames:
            return None
        pieces = _pieces(self.blocks, frames)
        rows = max(len(context.keys[0]) for context, _ in pieces)
        keys = zip(*([layer[:, tokens] for layer in context.keys] for context, tokens in pieces), strict=True)
        values = zip(*([layer[:, tokens] for layer in context.values] for context, tokens in pieces), strict=True)
        joined = [tuple(_joined(layer, rows) for layer in layers) for layers in (keys, values)]
        return Context(joined[0], joined[1], (tuple(frames),))

    def contexts(self, frames: Sequence[Sequence[int]]) -> Context | None:
        """Return the context of rows that attend to different frames, equally many each; see `context`."""
        if len(frames) == 1 or not frames[0]:
            return self.context(frames[0])
        found = [self.row(number).context(of_row) for number, of_row in enumerate(frames)]
        return Context.stack([context for context in found if context is not None])


def _joined(pieces: Sequence[Tensor], rows: int) -> Tensor:
    """Join along the tokens; what has one row has it for all."""
    return torch.cat([piece.expand(rows, -1, -1, -1) for piece in pieces], dim=1)


def _pieces(blocks: Sequence[CachedBlock], frames: Sequence[int]) -> list[tuple[Context, slice]]:
    """Return the tokens of each frame: what holds them, and where; neighbours of one block together."""
    owners = {frame: block for block in blocks for frame in block.frames}
    found: list[tuple[Context, slice]] = []
    for frame in frames:
        block = owners[frame]
        per_frame = block.written.keys[0].shape[1] // len(block.frames)
        begin = (frame - block.frames.start) * per_frame
        end = begin + per_frame
        if found and found[-1][0] is block.written and found[-1][1].stop == begin:
            begin = found.pop()[1].start
        found.append((block.written, slice(begin, end)))
    return found
