"""Writing checkpoints, in the background: aside, whole or not at all, and pruned by rule."""

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from flashgrpo.distributed.world import World, use_in_thread
from flashgrpo.errors import UserError
from flashgrpo.files import discard_aside, explain_os_errors, make_room_aside, publish, remove, write_json
from flashgrpo.jsontext import to_json
from flashgrpo.run.checkpoint import FORMAT, Progress, path_of, read_state, updates, with_digest
from flashgrpo.run.index import check_shards
from flashgrpo.run.shards import Tensors, digests, flush_shards, own_part


class Writer:
    """Writes checkpoints into `folder` while training continues: one at a time, in a thread.

    `save` copies what this rank writes to CPU memory and returns; what the disk says comes out of the next one.

    Attributes:
        saved: of the newest checkpoint that is on disk.
        begun: of the one that is being written.
    """

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self._folder, self._keep, self._world = folder, keep, world
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None  # collectives of the thread
        self._pending: _Background | None = None
        self.saved = self.begun = Progress()

    def resumed(self, progress: Progress) -> None:
        """Begin where a run has come to; of this there is a checkpoint, or nothing to save."""
        self.saved = self.begun = progress

    def save(self, tensors: Tensors, progress: Progress) -> None:
        """Begin to write `folder/UPDATE`; where that is there, only its progress. All ranks call this together.

        Raises:
            UserError: the one before could not be written; older ones are untouched.
        """
        self.wait()
        if progress.update == self.begun.update and self._world.on_main(lambda: self._amend(progress)):
            self.saved = self.begun = progress
            return
        path = path_of(self._folder, progress.update)
        aside = Path(self._world.on_main(lambda: str(make_room_aside(path))))
        copies = {
            kind: {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}
            for kind, named in own_part(tensors, self._world).items()
        }
        self._pending, self.begun = _Background(lambda: self._write(path, aside, copies, progress)), progress

    def wait(self) -> None:
        """Wait until what was begun is on disk, on all ranks."""
        pending, self._pending = self._pending, None
        if pending:
            try:
                self._world.on_all(pending.result)
            except UserError:
                self.begun = self.saved
                raise
        self.saved = self.begun

    def _amend(self, progress: Progress) -> bool:
        """Write what has become known of an update since its checkpoint, an evaluation; False if there is none."""
        path = path_of(self._folder, progress.update)
        try:
            state = read_state(path)
        except UserError:
            return False
        write_json(path / "state.json", with_digest({**state, "progress": asdict(progress)}), indent=2)
        _prune(self._folder, progress, self._keep)
        return True

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
        (folder / "state.json").write_text(to_json(with_digest(state), indent=2) + "\n", encoding="utf-8")


def _prune(folder: Path, progress: Progress, keep: int) -> None:
    saved = updates(folder)
    earlier = [update for update in saved if update <= progress.update]  # a later one was damaged, and passed over
    for update in set(saved) - {*earlier[-keep:], progress.best_update}:
        remove(path_of(folder, update))
