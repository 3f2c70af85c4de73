"""Whether all ranks see one run directory, found before anything is computed."""

import contextlib
import uuid
from pathlib import Path

from flashgrpo.distributed.world import World
from flashgrpo.errors import SharedError
from flashgrpo.files import write_text


def refuse_unshared(folder: Path, world: World) -> None:
    """Write a file on the main rank, look for it on all, and remove it; all ranks call this together.

    Raises:
        SharedError: some ranks have another folder of this name.
    """
    if world.size == 1:
        return
    new = not folder.exists()

    def write() -> str:
        name = f".probe-{uuid.uuid4().hex}"  # no machine can have asked for this name before
        write_text(folder / name, "")
        return name

    def remove() -> None:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
            if new:  # nothing is left of a run that is refused later
                folder.rmdir()

    name = world.on_main(write)
    seen = world.all_gather_json((folder / name).exists())
    world.on_main(remove)
    if blind := [str(rank) for rank, sees in enumerate(seen) if not sees]:
        raise SharedError(
            f"out: what rank 0 writes into {folder} is not there for rank {', '.join(blind)}; "
            "give a folder that all machines share, mounted at the same place on each"
        )
