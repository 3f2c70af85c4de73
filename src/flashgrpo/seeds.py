"""Random numbers are named by what they are for: never by process, order of calls or a global state.

So any number of processes, a run that was interrupted, and any share of an update's rows draw the same numbers.
"""

import hashlib

Name = tuple[int | str, ...]
"""Names a draw: `(seed, purpose, *ids)`, for instance (0, "noise", update, group, member)."""


def keyed_bits(purpose: int | str, *ids: int | str) -> int:
    """64 uniform bits that depend on the name alone, in every process, on every machine, in every release of torch.

    The name is hashed (BLAKE2b), so neighbouring ids are unrelated.
    """
    name = "/".join(map(str, [purpose, *ids]))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def generator(seed: int | str, purpose: int | str, *ids: int | str) -> "torch.Generator":
    """Return a CPU generator by name: `generator(seed, "noise", update, group, member)`."""
    import torch  # which settings, whose draws are `keyed_bits` alone, do without

    return torch.Generator().manual_seed(keyed_bits(purpose, seed, *ids) >> 1)  # torch takes 63 bits


def normal(shape: tuple[int, ...], seed: int | str, purpose: int | str, *ids: int | str) -> "torch.Tensor":
    """Standard normal float32 of `shape` from the named generator, on the CPU (so that every device gets the same)."""
    import torch

    return torch.randn(shape, generator=generator(seed, purpose, *ids))
