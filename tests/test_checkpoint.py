"""Checkpoints appear whole or not at all, are recognised when damaged, and are pruned by rule."""

import errno
import os
import resource

import pytest
import torch

from flashgrpo import checkpoint
from flashgrpo.checkpoint import Progress
from flashgrpo.errors import UserError
from flashgrpo.files import append_line, write_aside
from flashgrpo.run_directory import read_lines

TENSORS = {"policy": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}, "ema": {"a": torch.ones(2, 3).T}}


def save(folder, update, best=0, keep=2):
    return checkpoint.save(folder, TENSORS, Progress(update, best, 1), keep)


def test_what_is_loaded_is_what_was_saved(tmp_path):
    save(tmp_path, 3)
    tensors, progress = checkpoint.load(tmp_path, 3)
    assert progress == Progress(3, 0, 1)
    for kind, named in TENSORS.items():
        for name, tensor in named.items():
            assert torch.equal(tensors[kind][name], tensor)


def test_the_newest_and_the_best_are_kept(tmp_path):
    for update in range(1, 8):
        save(tmp_path, update, best=2 if update >= 2 else 0, keep=3)
    assert checkpoint.updates(tmp_path) == [2, 5, 6, 7]


@pytest.mark.parametrize("file", ["policy.safetensors", "ema.safetensors", "state.json"])
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
    _, progress = checkpoint.load_newest(tmp_path, said.append)
    assert progress.update == 1
    assert len(said) == 1
    assert "000002" in said[0]
    assert "trying the one before" in said[0]


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_newer_checkpoints_do_not_crowd_out_whole_ones(tmp_path, keep):
    for update in (10, 20, 30):
        save(tmp_path, update, keep=9)
    for update in (20, 30):
        (tmp_path / f"{update:06d}/state.json").write_text("{")
    assert checkpoint.load_newest(tmp_path, lambda _: None)[1].update == 10
    save(tmp_path, 12, keep=keep)
    assert checkpoint.updates(tmp_path) == [10, 12][-keep:]
    assert checkpoint.load_newest(tmp_path, print)[1].update == 12


def test_no_checkpoint_and_no_whole_checkpoint(tmp_path):
    assert checkpoint.load_newest(tmp_path, print) is None
    with pytest.raises(UserError, match="has no checkpoint yet"):
        checkpoint.load_best(tmp_path, None, print)
    (save(tmp_path, 1) / "state.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        checkpoint.load_newest(tmp_path, lambda _: None)


def test_the_best_is_loaded_unless_another_is_named(tmp_path):
    for update in (1, 2, 3):
        save(tmp_path, update, best=1)
    assert checkpoint.load_best(tmp_path, None, print)[1].update == 1
    assert checkpoint.load_best(tmp_path, 3, print)[1].update == 3
    with pytest.raises(UserError, match="no checkpoint of update 9; there are 1, 2, 3"):
        checkpoint.load_best(tmp_path, 9, print)


def test_a_disk_that_fills_up_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*000002: no space left on device"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["000001"]
    assert checkpoint.load_newest(tmp_path, print)[1].update == 1


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
    with pytest.raises(UserError, match="has a line that is no JSON"):
        read_lines(file)


def test_a_line_cut_short_is_passed_over(tmp_path):
    file = tmp_path / "metrics.jsonl"
    append_line(file, '{"update": 1}')
    append_line(file, '{"update": 2}')
    file.write_bytes(file.read_bytes()[:-4])
    assert read_lines(file) == [{"update": 1}]
    assert read_lines(tmp_path / "none.jsonl") == []
