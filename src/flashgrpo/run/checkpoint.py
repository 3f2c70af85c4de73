"""Save and resume everything that determines the rest of a run.

A checkpoint is a folder `checkpoints/000040` in the format of torch.distributed.checkpoint (DCP): each rank writes its
own shards, and any number of ranks, or one process, reads them. `state.json` beside them holds the progress and each
file's SHA-256; it is written last, so a checkpoint that was cut short or changed is recognised. A folder has its name
only when it is whole. Pruning keeps the newest `keep` and the best.
"""

import errno
import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from flashgrpo.distributed.world import World, single_process, use_in_thread
from flashgrpo.errors import UserError, system_reason
from flashgrpo.files import discard_aside, explain_os_errors, make_room_aside, publish, read_object, remove
from flashgrpo.jsontext import to_json
from flashgrpo.run.index import ShardReader, check_shards
from flashgrpo.run.shards import Tensors, digests, flush_shards, own_part

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


class Writer:
    """Writes checkpoints into `folder` while training continues: one at a time, in a thread.

    `save` copies what this rank writes to CPU memory and returns; what the disk says comes out of the next one.
    """

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self._folder, self._keep, self._world = folder, keep, world
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None  # collectives of the thread
        self._pending: _Background | None = None

    def save(self, tensors: Tensors, progress: Progress) -> None:
        """Begin to write `folder/UPDATE`; all ranks call this together.

        Raises:
            UserError: the one before could not be written; older ones are untouched.
        """
        self.wait()
        path = _path(self._folder, progress.update)
        aside = Path(self._world.on_main(lambda: str(make_room_aside(path))))
        copies = {
            kind: {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}
            for kind, named in own_part(tensors, self._world).items()
        }
        self._pending = _Background(lambda: self._write(path, aside, copies, progress))

    def wait(self) -> None:
        """Wait until what was begun is on disk, on all ranks."""
        pending, self._pending = self._pending, None
        if pending:
            self._world.on_all(pending.result)

    def _write(self, path: Path, aside: Path, tensors: Tensors, progress: Progress) -> None:
        use_in_thread(1, self._world.device)
        try:
            with explain_os_errors(path):
                _write_shards(tensors, aside, self._group)
                _seal(aside, progress, replace(self._world, cpu_group=self._group, meetings="checkpoint"))
                if self._world.is_main:
                    publish(path)
                    _prune(self._folder, progress, self._keep)
        except BaseException:
            if self._world.is_main:
                discard_aside(path)
            raise


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
    path = _path(folder, update)
    try:
        state = read_object(path / "state.json")
    except UserError as error:
        raise UserError(f"checkpoint {path} is not whole: {error}") from error
    try:
        if isinstance(state["format"], int) and state["format"] != FORMAT:
            raise OtherFormat(
                f"checkpoint {path} has format {state['format']} and this version of flashgrpo reads {FORMAT}; "
                "take the version that wrote it"
            )
        if state.pop("digest") != _digest_of(state) or state["progress"]["update"] != update:
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


def read_into(folder: Path, update: int, tensors: Tensors, world: World) -> None:
    """Read `folder/UPDATE` into the tensors that are there; all ranks call this together.

    Raises:
        UserError: the names or shapes are those of another network or adapter.
    """
    reader = ShardReader(_path(folder, update))
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
    metadata = ShardReader(_path(folder, update)).read_metadata()
    state: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for full_name, there in metadata.state_dict_metadata.items():
        kind, _, name = full_name.partition(".")
        if kind in state and isinstance(there, TensorStorageMetadata):
            state[kind][name] = torch.empty(there.size, dtype=there.properties.dtype)
    dcp.load(state, storage_reader=ShardReader(_path(folder, update)))
    return state


def updates(folder: Path) -> list[int]:
    """List the updates that have a checkpoint, rising."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit() and path.is_dir())


def _write_shards(tensors: Tensors, folder: Path, group: Any) -> None:
    try:
        writer = dcp.FileSystemWriter(folder, sync_files=False)  # which insists on what some file systems lack
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except dcp.api.CheckpointException as error:  # on every rank; it holds what happened on the one that failed
        failure = next(iter(error.failures.values()))[0]
        if isinstance(failure, RuntimeError) and "inline_container" in str(failure):  # torch's archive, of a full disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise failure from error


class _Background(threading.Thread):
    """Computes in a daemon thread: one that hangs on a rank that has died must not keep this process from ending.

    A thread that still frees tensors while the interpreter ends aborts the process (it asks for the lock inside of a
    C++ destructor). So the result is that of a thread which has gone.
    """

    def __init__(self, compute: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._compute: Callable[[], None] | None = compute
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Compute, and let go of whatever that took."""
        compute, self._compute = self._compute, None
        assert compute is not None
        try:
            compute()
        except BaseException as error:
            self._error = error

    def result(self) -> None:
        """Wait for its end; raises what it raised."""
        self.join()
        if self._error is not None:
            raise self._error


def _seal(folder: Path, progress: Progress, world: World) -> None:
    """Write state.json, with the digests that the ranks compute; all ranks call this together."""
    world.on_all(
        lambda: None if world.is_main else flush_shards(folder, world.rank)
    )  # that one flushes as it publishes

    def written() -> list[str]:
        check_shards(folder)
        with explain_os_errors(folder):
            return sorted(file.name for file in folder.iterdir())

    names = world.on_main(written)
    state = {"format": FORMAT, "files": digests(folder, names, world), "progress": asdict(progress)}
    if world.is_main:
        text = to_json({**state, "digest": _digest_of(state)}, indent=2)
        (folder / "state.json").write_text(text + "\n", encoding="utf-8")


def _prune(folder: Path, progress: Progress, keep: int) -> None:
    saved = updates(folder)
    earlier = [update for update in saved if update <= progress.update]  # a later one was damaged, and passed over
    for update in set(saved) - {*earlier[-keep:], progress.best_update}:
        remove(_path(folder, update))


def _path(folder: Path, update: int) -> Path:
    return folder / f"{update:06d}"


def _digest_of(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(state, sort_keys=True).encode()).hexdigest()
