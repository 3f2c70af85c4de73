"""Network calls of one fixed size, which make a replay give the same bits as the draw; and calls by other weights.

Kernels round differently for different batch sizes. So everything whose result is judged is computed on a fixed
number of rows a call, by drawing and by replay alike; a last batch is filled up with copies of its last row.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flashgrpo.distributed.world import World


def fixed_batches(count: int, size: int) -> Iterator[tuple[Int64[Tensor, " size"], int]]:
    """Cut `count` rows into batches of exactly `size`: yields the rows of each, and how many of them are new.

    Example: 3 rows in batches of 2 are ([0, 1], 2) and ([2, 2], 1).
    """
    for first in range(0, count, size):
        new = min(size, count - first)
        yield first + torch.arange(size).clamp(max=new - 1), new


def number_of_calls(count: int, size: int) -> int:
    """Return how many batches those are."""
    return -(-count // size)


def missing_calls(world: World, made: int) -> int:
    """Return how many more calls another rank makes: those that hold a network between them call together."""
    return int(world.max_over_ranks(torch.tensor(made))) - made


def by_other_weights(
    columns: Sequence[str],
    weights: Mapping[str, Callable[[], AbstractContextManager[None]]],
    call: Callable[[], Tensor],
) -> dict[str, Tensor]:
    """Make a call under the weights of each column that is asked for, without gradient; all ranks in this order.

    Args:
        weights: column -> the context in which the network has them: "kl" of the base model, "kl_average" of the
            averaged weights.
    """
    found = {}
    for name, context in weights.items():
        if name in columns:
            with torch.no_grad(), context():
                found[name] = call()
    return found


def mean_of_rows(values: Float[Tensor, "batch *latent"]) -> Float[Tensor, " batch"]:
    """Mean over the latent dims, one reduction per row.

    `values.flatten(1).mean(1)` would let the number of rows decide how threads split a sum, and a sample scored alone
    would differ in its last bits from the same sample scored in a batch.
    """
    return torch.stack([row.mean() for row in values])
