"""What each rank does for a checkpoint: tensors that it copies and writes, files whose digests it computes."""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError
from flashgrpo.files import explain_os_errors, flush_to_disk

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Kind -> name -> tensor."""
THREADS = 8  # that compute digests; hashing leaves Python's lock


def own_part(tensors: Tensors, world: World) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of which this rank writes what it holds, by kind and name.

    Ranks that hold the same tensor, or the same shard of it, share them out, so that a replicated state is copied and
    written once by all ranks together. The largest tensor goes first, each to the ranks with fewest bytes so far. DCP
    would find the same, but only among copies of everything on every rank.
    """
    holders = world.shard * world.context if world.uses_fsdp else 1  # ranks that hold one copy between them
    written, own = [0] * (world.size // holders), dict[str, dict[str, Tensor]]()
    every = [(kind, name, tensor) for kind, named in tensors.items() for name, tensor in named.items()]
    for kind, name, tensor in sorted(every, key=lambda one: -_size(one[2])):  # stable: the same order on all ranks
        writer = written.index(min(written))
        written[writer] += _size(tensor)
        if writer == world.rank // holders:
            own.setdefault(kind, {})[name] = tensor
    return own


def digests(folder: Path, names: Sequence[str], world: World) -> dict[str, str]:
    """Compute the SHA-256 of files, each on one of the ranks; all ranks call this together.

    Raises:
        UserError: a file cannot be read; on all ranks.
    """

    def own() -> dict[str, str]:
        mine = names[world.rank :: world.size]
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                return dict(zip(mine, pool.map(lambda name: _digest(folder / name), mine), strict=True))
        except OSError as error:
            raise UserError(f"checkpoint {folder} is not whole: {error.filename} cannot be read") from error

    return {name: digest for part in world.on_all(own) for name, digest in part.items()}


def flush_shards(folder: Path, rank: int) -> None:
    """Wait until the shards that a rank has written are on disk, for which its own machine has to be asked.

    Raises:
        UserError: the disk did not take them.
    """
    with explain_os_errors(folder):
        for file in folder.glob(f"__{rank}_*.distcp"):
            flush_to_disk(file)


def _size(tensor: Tensor) -> int:
    """Count the bytes of a tensor on all ranks."""
    return tensor.numel() * tensor.element_size()


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
