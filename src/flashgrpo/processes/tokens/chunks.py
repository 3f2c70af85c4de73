"""Logits of a few tokens at a time: 1,024 tokens of 64,000 kinds have 262 MB of them, a sample.

Whatever is made of logits is made for the same tokens of all rows of a call together, so that a token's place in a
chunk, and with it the rounding of its logits, does not depend on which row it is in.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flashgrpo.processes.tokens.model import Head

AT_ONCE = 2**24  # logits, 67 MB in float32


def chunks(rows: int, length: int, vocabulary: int) -> Iterator[slice]:
    """Cut the tokens of `rows` samples into chunks with at most `AT_ONCE` logits, or of one token.

    Example: 4 samples of 1,024 tokens of 64,000 kinds are cut into 15 chunks of 65 tokens and one of 49.
    """
    size = max(1, AT_ONCE // (rows * vocabulary))
    return (slice(first, min(first + size, length)) for first in range(0, length, size))


def by_chunks(
    hidden: Float[Tensor, "batch tokens dim"],
    head: Head,
    vocabulary: int,
    make: Callable[[slice, Tensor], Tensor],
) -> Shaped[Tensor, "batch tokens *more"]:
    """Return what `make` makes of the logits of each chunk, side by side.

    With gradients, the logits of a chunk are not kept but computed again in the backward pass, where there is more than
    one.

    Args:
        make: takes the tokens of a chunk and their logits (B, c, V), and gives (B, c, ...).
    """
    rows, length = hidden.shape[:2]
    parts = list(chunks(rows, length, vocabulary))
    if len(parts) == 1 or not torch.is_grad_enabled():
        return torch.cat([make(tokens, head(hidden[:, tokens])) for tokens in parts], dim=1)
    again = partial(checkpoint, partial(_made, make, head), use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(hidden[:, tokens], tokens) for tokens in parts], dim=1)


def _made(make: Callable[[slice, Tensor], Tensor], head: Head, hidden: Tensor, tokens: slice) -> Tensor:
    return make(tokens, head(hidden))


def categorical(weights: Float[Tensor, "*rows kinds"], uniform: Float64[Tensor, "*rows"]) -> Int64[Tensor, "*rows"]:
    """Draw a kind with a probability proportional to its weight, one by each number in [0, 1).

    It is the first at which the sum of weights so far exceeds `uniform` times the whole sum. One number for a draw
    rather than one for each kind: so numbers can be named and drawn on the CPU, for 64,000 kinds too.

    Example: of weights (1, 2, 1) a number below 0.25 draws 0, one from 0.25 to 0.75 draws 1, any other draws 2.
    """
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    total = sums[..., -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # the product may round up to the whole sum
    return torch.searchsorted(sums, torch.minimum(uniform[..., None] * total, below), right=True)[..., 0]
