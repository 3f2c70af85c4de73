"""Where a run computes, and where its randomness comes from."""

import hashlib

import torch
from torch import Tensor


def default_device() -> torch.device:
    """The first CUDA device when there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def use_threads(threads: int | None) -> None:
    """Set the number of CPU threads; None leaves the tensor library's choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def generator(seed: int, purpose: str, *ids: int) -> torch.Generator:
    """A CPU generator named by what it is for: `generator(seed, "noise", update, group, member)`.

    Never named by rank or by call order, so that any number of processes, and a run that was interrupted, draw the
    same numbers. The name is hashed (BLAKE2b, 63 bits), so neighbouring ids give unrelated streams.
    """
    name = ":".join(map(str, (seed, purpose, *ids)))
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def normal(shape: tuple[int, ...], seed: int, purpose: str, *ids: int) -> Tensor:
    """Standard normal float32 of `shape` from the named generator, on the CPU (so that every device gets the same)."""
    return torch.randn(shape, generator=generator(seed, purpose, *ids))
