"""Checkpoints appear whole or not at all, are recognised when damaged, and are pruned by rule."""

import errno
import os
import pickle
import resource
import shutil
import threading
import time

import pytest
import torch

from flashgrpo.distributed.world import single_process
from flashgrpo.errors import UserError
from flashgrpo.files import append_line, write_aside
from flashgrpo.run import checkpoint, writer
from flashgrpo.run.checkpoint import Progress
from flashgrpo.run.lines import read_lines

TENSORS = {"policy": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}, "ema": {"a": torch.ones(2, 3).T}}


def save(folder, update, best=0, keep=2, tensors=TENSORS):
    writes = writer.Writer(folder, keep, single_process())
    writes.save(tensors, Progress(update, best, 1))
    writes.wait()
    return folder / f"{update:06d}"


def test_what_is_loaded_is_what_was_saved(tmp_path):
    save(tmp_path, 3)
    tensors = checkpoint.load(tmp_path, 3)
    assert checkpoint.read_progress(tmp_path, 3) == Progress(3, 0, 1)
    for kind, named in TENSORS.items():
        for name, tensor in named.items():
            assert torch.equal(tensors[kind][name], tensor)


def test_what_an_evaluation_says_is_written_into_the_checkpoint_that_is_there(tmp_path):
    writes = writer.Writer(tmp_path, 1, single_process())
    writes.save(TENSORS, Progress(1))
    writes.save(TENSORS, Progress(2))
    writes.wait()
    shard = next((tmp_path / "000002").glob("*.distcp"))
    before = shard.stat().st_mtime_ns
    writes.save(TENSORS, Progress(2, best_update=2, evaluated=(2,)))
    assert checkpoint.read_progress(tmp_path, 2) == writes.saved == Progress(2, best_update=2, evaluated=(2,))
    assert shard.stat().st_mtime_ns == before


@pytest.mark.parametrize("file", ["state.json", "."])
def test_a_checkpoint_that_has_gone_or_changed_since_is_written_anew(tmp_path, file):
    writes = writer.Writer(tmp_path, 2, single_process())
    writes.save(TENSORS, Progress(2))
    writes.wait()
    if file == ".":
        shutil.rmtree(tmp_path / "000002")
    else:
        (tmp_path / "000002" / file).write_text('{"progress": {}}', "utf-8")
    writes.save(TENSORS, Progress(2, stale=1))
    writes.wait()
    assert checkpoint.read_progress(tmp_path, 2) == Progress(2, stale=1)


def test_the_newest_and_the_best_are_kept(tmp_path):
    for update in range(1, 8):
        save(tmp_path, update, best=2 if update >= 2 else 0, keep=3)
    assert checkpoint.updates(tmp_path) == [2, 5, 6, 7]


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "empty"])
def test_damage_is_recognised_and_the_one_before_is_used(tmp_path, file, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / file
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        changed = bytes([content[-5] ^ 1])
        path.write_bytes({"cut": content[:-3], "changed": content[:-5] + changed + content[-4:], "empty": b""}[damage])
    said = []
    assert checkpoint.newest_whole(tmp_path, said.append) == 1
    assert len(said) == 1
    assert "000002" in said[0]
    assert "trying the one before" in said[0]


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_newer_checkpoints_do_not_crowd_out_whole_ones(tmp_path, keep):
    for update in (10, 20, 30):
        save(tmp_path, update, keep=9)
    for update in (20, 30):
        (tmp_path / f"{update:06d}/state.json").write_text("{")
    assert checkpoint.newest_whole(tmp_path, lambda _: None) == 10
    save(tmp_path, 12, keep=keep)
    assert checkpoint.updates(tmp_path) == [10, 12][-keep:]
    assert checkpoint.newest_whole(tmp_path, print) == 12


def test_no_checkpoint_and_no_whole_checkpoint(tmp_path):
    assert checkpoint.newest_whole(tmp_path, print) is None
    with pytest.raises(UserError, match="has no checkpoint yet"):
        checkpoint.choose(tmp_path, None, print)
    (save(tmp_path, 1) / "state.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        checkpoint.newest_whole(tmp_path, lambda _: None)


def test_the_best_is_loaded_unless_another_is_named(tmp_path):
    for update in (1, 2, 3):
        save(tmp_path, update, best=1)
    assert checkpoint.choose(tmp_path, None, print) == 1
    assert checkpoint.choose(tmp_path, 3, print) == 3
    with pytest.raises(UserError, match="no checkpoint of update 9; there are 1, 2, 3"):
        checkpoint.choose(tmp_path, 9, print)


def test_tensors_are_read_into_those_that_are_there(tmp_path):
    save(tmp_path, 1)
    there = {"ema": {"a": torch.zeros(3, 2)}}
    address = there["ema"]["a"].data_ptr()
    checkpoint.read_into(tmp_path, 1, there, single_process())
    assert torch.equal(there["ema"]["a"], TENSORS["ema"]["a"])
    assert there["ema"]["a"].data_ptr() == address
    for other in (
        {"a": torch.zeros(3, 3)},
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(1)},
        {},
    ):
        with pytest.raises(UserError, match="of another model or adapter"):
            checkpoint.read_into(tmp_path, 1, {"ema": other}, single_process())


def test_a_save_does_not_see_what_training_changes_meanwhile(tmp_path, monkeypatch):
    weights, gate, real = torch.zeros(4), threading.Event(), checkpoint.dcp.save

    def slow(*arguments, **options):
        gate.wait(300)
        return real(*arguments, **options)

    monkeypatch.setattr(writer.dcp, "save", slow)
    writes = writer.Writer(tmp_path, 2, single_process())
    writes.save({"policy": {"w": weights}}, Progress(1))
    assert checkpoint.updates(tmp_path) == []  # not whole yet, and training is not held up
    weights += 1
    gate.set()
    writes.wait()
    assert torch.equal(checkpoint.load(tmp_path, 1)["policy"]["w"], torch.zeros(4))


def test_the_thread_that_writes_has_gone_when_its_result_is_there():
    """One that still frees tensors while the interpreter ends aborts the process, of a run that has succeeded."""
    freed = threading.Event()

    class Slow:
        def __del__(self):
            time.sleep(0.2)
            freed.set()

    def background():
        held = Slow()
        return writer._Background(lambda: held and None)

    background().result()
    assert freed.is_set()


def test_a_file_that_was_changed_is_noticed_by_its_digest(tmp_path):
    path = save(tmp_path, 1)
    [shard] = path.glob("*.distcp")
    whole, state = shard.read_bytes(), (path / "state.json").read_text("utf-8")
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"is damaged: .*distcp has changed since it was written"):
        checkpoint.read_progress(tmp_path, 1)
    shard.write_bytes(whole)
    (path / "state.json").write_text(state.replace('"update": 1', '"update": 2'), "utf-8")
    with pytest.raises(UserError, match=r"is damaged: state\.json has changed since it was written"):
        checkpoint.read_progress(tmp_path, 1)


def test_an_index_with_anything_but_an_index_in_it_is_refused(tmp_path):
    """The index of DCP is a pickle; one that was made to run a command must not."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    path = save(tmp_path, 1)
    for evil in (Evil(), print, checkpoint.dcp.save, torch.load):
        (path / ".metadata").write_bytes(pickle.dumps(evil))
        with pytest.raises(UserError, match=r"its index cannot be read \(.* has no place in a checkpoint\)"):
            checkpoint.load(tmp_path, 1)
    assert not (tmp_path / "ran").exists()


def test_a_disk_that_fills_up_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*000002: no space left on device"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["000001"]
    assert checkpoint.newest_whole(tmp_path, print) == 1


def test_a_disk_that_fills_up_in_the_middle_of_a_tensor(tmp_path):
    """torch's archive says that in words of its own."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*000001: no space left on device"):
            save(tmp_path, 1, tensors={"policy": {"w": torch.zeros(400_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")

    def interrupted() -> None:
        with write_aside(file) as aside:
            aside.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
    with write_aside(file) as aside:
        aside.write_text("new")
    assert file.read_text() == "new"


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "metrics.jsonl"
    append_line(file, '{"update": 1}')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write"):
            append_line(file, '{"update": 2, "padding": "' + 200 * "x" + '"}')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_lines(file) == [{"update": 1}]
    file.write_text('{"update": 1}\n{"upd\n{"update": 2}\n')
    with pytest.raises(
        UserError, match=r"metrics.jsonl line 2 is no line that a run writes \(no JSON, .*\): something"
    ):
        read_lines(file)


def test_a_line_cut_short_is_passed_over(tmp_path):
    file = tmp_path / "metrics.jsonl"
    append_line(file, '{"update": 1}')
    append_line(file, '{"update": 2}')
    file.write_bytes(file.read_bytes()[:-4])
    assert read_lines(file) == [{"update": 1}]
    assert read_lines(tmp_path / "none.jsonl") == []
