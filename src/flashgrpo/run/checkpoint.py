"""Save and resume everything that determines the rest of a run.

A checkpoint is a folder `checkpoints/000040` in the format of torch.distributed.checkpoint (DCP): each rank writes its
own shards, and any number of ranks, or one process, reads them. `state.json` beside them holds the progress and each
file's SHA-256; it is written last, so a checkpoint that was cut short or changed is recognised. A folder has its name
only when it is whole. Pruning keeps the newest `keep` and the best.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from flashgrpo.distributed.world import World, single_process
from flashgrpo.errors import UserError, system_reason
from flashgrpo.files import read_object
from flashgrpo.jsontext import to_json
from flashgrpo.run.index import ShardReader, check_shards
from flashgrpo.run.shards import Tensors, digests

FORMAT = 2
warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process")


@dataclass(frozen=True)
class Progress:
    """Where a run stands, besides its tensors.

    Args:
        update: updates done.
        best_update: the update of the best held-out reward so far; 0 is the base model.
        stale: evaluations since then.
        evaluated: the updates that have an evaluation; empty in checkpoints of older versions.
        skipped_in_a_row: optimizer steps skipped since the last that was taken.
    """

    update: int = 0
    best_update: int = 0
    stale: int = 0
    evaluated: tuple[int, ...] = ()
    skipped_in_a_row: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Progress":
        """Build it from JSON, which has lists only."""
        return cls(**{**values, "evaluated": tuple(values.get("evaluated", ()))})


class OtherFormat(UserError):
    """A checkpoint of another version of this package: it is not damaged, and so none before it is taken."""


def newest_whole(
    folder: Path, warn: Callable[[str], None], lost: Callable[[Progress], str | None] = lambda _: None
) -> int | None:
    """Return the update of the newest whole checkpoint, or None; `warn` is called for each that is passed over.

    Args:
        lost: says what the run's other files lack of what a checkpoint knows, if anything.

    Raises:
        UserError: there are checkpoints and none is whole, or the newest is of another version.
    """
    saved, why = updates(folder), None
    for update in reversed(saved):
        try:
            progress = read_progress(folder, update)
        except OtherFormat:
            raise
        except UserError as error:
            warn(f"{error}; trying the one before")
            continue
        if not (lines := lost(progress)):
            return update
        why = why or lines
        warn(f"{lines}, which checkpoint {update} knows; trying the one before")
    if why:
        raise UserError(f"{why}; put them back, or empty the file to go on without what it held")
    if saved:
        raise UserError(f"no checkpoint in {folder} is whole; put one back, or choose another out to begin anew")
    return None


def choose(folder: Path, update: int | None, warn: Callable[[str], None]) -> int:
    """`update` itself; without one, that of the best held-out reward, or the newest where none beat the base.

    Raises:
        UserError: there is no checkpoint of it, or it is damaged.
    """
    saved = updates(folder)
    if update is None:
        newest = newest_whole(folder, warn)
        if newest is None:
            raise UserError(f"{folder.parent} has no checkpoint yet")
        best = read_progress(folder, newest).best_update
        update = best if best in saved else newest
    if update not in saved:
        raise UserError(f"{folder.parent} has no checkpoint of update {update}; there are {', '.join(map(str, saved))}")
    read_progress(folder, update)
    return update


def read_progress(folder: Path, update: int) -> Progress:
    """Read the progress in `folder/UPDATE`, after all its files have been checked against their digests.

    Raises:
        UserError: it is missing, cut short, changed, or of another format.
    """
    path = path_of(folder, update)
    state = read_state(path)
    try:
        if state["progress"]["update"] != update:
            raise UserError(f"checkpoint {path} is damaged: state.json has changed since it was written")
        found = digests(path, list(state["files"]), single_process(computes=False))
        for name, digest in state["files"].items():
            if found[name] != digest:
                raise UserError(f"checkpoint {path} is damaged: {name} has changed since it was written")
        check_shards(path)
        return Progress.of(state["progress"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        why = f": {system_reason(error)}" if isinstance(error, OSError) else ""
        raise UserError(f"checkpoint {path} is not whole{why}") from error


def read_state(path: Path) -> dict[str, Any]:
    """Read state.json of a checkpoint: format, progress and the digests of its files, which are not checked here.

    Raises:
        UserError: it is missing, changed, or of another format.
    """
    try:
        state = read_object(path / "state.json")
    except UserError as error:
        raise UserError(f"checkpoint {path} is not whole: {error}") from error
    if isinstance(state.get("format"), int) and state["format"] != FORMAT:
        raise OtherFormat(
            f"checkpoint {path} has format {state['format']} and this version of flashgrpo reads {FORMAT}; "
            "take the version that wrote it"
        )
    if state != with_digest(state):
        raise UserError(f"checkpoint {path} is damaged: state.json has changed since it was written")
    return state


def read_into(folder: Path, update: int, tensors: Tensors, world: World) -> None:
    """Read `folder/UPDATE` into the tensors that are there; all ranks call this together.

    Raises:
        UserError: the names or shapes are those of another network or adapter.
    """
    reader = ShardReader(path_of(folder, update))
    saved = reader.read_metadata().state_dict_metadata
    wanted = {f"{kind}.{name}": tensor for kind, named in tensors.items() for name, tensor in named.items()}
    kinds = tuple(f"{kind}." for kind in tensors)
    for name in [*wanted, *(name for name in saved if name.startswith(kinds))]:
        there = saved.get(name)
        if name not in wanted or not isinstance(there, TensorStorageMetadata) or there.size != wanted[name].shape:
            raise UserError(f"the checkpoint is of another model or adapter: {name} is missing or of another shape")
    state = {kind: dict(named) for kind, named in tensors.items()}
    dcp.load(state, storage_reader=reader)


def load(
    folder: Path, update: int, kinds: Sequence[str] = ("policy", "ema", "optimizer")
) -> dict[str, dict[str, Tensor]]:
    """Load the whole tensors of `folder/UPDATE` on the CPU, by kind and name, whatever number of ranks wrote them."""
    metadata = ShardReader(path_of(folder, update)).read_metadata()
    state: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for full_name, there in metadata.state_dict_metadata.items():
        kind, _, name = full_name.partition(".")
        if kind in state and isinstance(there, TensorStorageMetadata):
            state[kind][name] = torch.empty(there.size, dtype=there.properties.dtype)
    dcp.load(state, storage_reader=ShardReader(path_of(folder, update)))
    return state


def updates(folder: Path) -> list[int]:
    """List the updates that have a checkpoint, rising."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit() and path.is_dir())


def path_of(folder: Path, update: int) -> Path:
    """Return the folder of an update's checkpoint."""
    return folder / f"{update:06d}"


def with_digest(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what state.json holds with the digest of the rest, by which a change is noticed."""
    known = {key: value for key, value in state.items() if key != "digest"}
    return {**known, "digest": hashlib.sha256(to_json(known, sort_keys=True).encode()).hexdigest()}
