"""What a run survives: holes in its lines, shards that are missing, an export that failed, a system without locks."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from flashgrpo.config import RunConfig
from flashgrpo.errors import UserError
from flashgrpo.files import append_line, lock, write_text
from flashgrpo.processes.flow.process import FlowProcess
from flashgrpo.run import checkpoint, writer
from flashgrpo.run.lines import read_lines
from flashgrpo.run.progress import Reporter
from flashgrpo.train import train
from tests.conftest import small_run
from tests.end_to_end.test_train import same, weights
from tests.filesystem import Fault, failing
from tests.run.test_checkpoint import save

ADAPTERS = "lora/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of two updates, both evaluated, of which the second is the best."""
    return train(small_run(tmp_path_factory.mktemp("finished") / "run", "updates=2", "evaluation.every=1"))


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(run: Path, updates: int = 2) -> None:
    train(RunConfig.load(run / "config.yaml", [f"out={run}", f"updates={updates}"]))


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_checkpoint_is_whole_only_with_all_shards_that_its_index_names(tmp_path, monkeypatch, damage):
    """Two machines with a folder each: every rank has written, and nothing that is there is damaged."""
    real = writer._write_shards

    def write(tensors, folder, group):
        real(tensors, folder, group)
        (shard,) = folder.glob("*.distcp")
        os.truncate(shard, 10) if damage == "short" else shard.unlink()

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_shards", write)
        with pytest.raises(UserError, match=r"__0_0.distcp is missing or too short; do all machines see the same"):
            save(tmp_path, 1)
        assert list(tmp_path.iterdir()) == []
        patch.setattr(writer, "check_shards", lambda folder: None)
        save(tmp_path, 1)  # as an earlier version did
    with pytest.raises(UserError, match=r"000001 is not whole: __0_0.distcp"):
        checkpoint.choose(tmp_path, 1, print)


def test_a_checkpoint_of_a_newer_version_stops_the_run(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    write_text(tmp_path / "000002/state.json", json.dumps({"format": 3, "whatever": "it holds"}))
    with pytest.raises(UserError, match=r"000002 has format 3 and this version .* take the version that wrote it"):
        checkpoint.newest_whole(tmp_path, print)
    assert checkpoint.updates(tmp_path) == [1, 2]


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
@pytest.mark.parametrize("rest", [b"", b"\0\0\0\0\n", b'{"update": 2, "re', b"\xff\xfe\n", b"3\n"])
def test_lines_that_a_power_cut_took_are_computed_again(run, finished, capsys, name, rest):
    lines = (run / name).read_bytes().splitlines(keepends=True)
    (run / name).write_bytes(b"".join(lines[:-1]) + rest)
    resume(run)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{name} has lost the lines of updates 2, which checkpoint 2 knows; trying the one before" in said
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        assert [line["update"] for line in read_lines(run / file)] == [
            line["update"] for line in read_lines(finished / file)
        ]
    assert same(weights(run, 2), weights(finished, 2))


def test_where_a_run_goes_on_is_said(tmp_path):
    """Also of one that was killed before its first checkpoint: it begins anew, and does not score the base twice."""
    told, settings = io.StringIO(), ("updates=1", "tracking.preflight=skip")
    config, reporter = small_run(tmp_path / "run", *settings), Reporter(Console(file=told, width=500))
    shutil.rmtree(train(config) / "checkpoints")
    (tmp_path / "run/confirmation.json").unlink(missing_ok=True)
    train(config, reporter)
    assert f"{tmp_path}/run has no checkpoint: from update 1, with the base model's score" in told.getvalue()
    assert "scoring the base model" not in told.getvalue()
    train(small_run(tmp_path / "run", *settings, "updates=2"), reporter)
    assert f"continuing {tmp_path}/run after update 1" in told.getvalue()
    assert [line["update"] for line in read_lines(tmp_path / "run/metrics.jsonl")] == [1, 2]


def test_a_hole_that_no_checkpoint_is_older_than(run, finished, capsys):
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().splitlines(keepends=True)[1])
    with pytest.raises(UserError, match=r"lost the lines of updates 1; put them back, or empty the file to go on"):
        resume(run)
    file.write_text("")
    resume(run, 3)
    assert "metrics.jsonl holds no line of the 2 updates that are done" in " ".join(capsys.readouterr().err.split())
    assert [line["update"] for line in read_lines(file)] == [3]


def adapters(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / ADAPTERS)


@pytest.mark.parametrize("state", ["missing", "stale", "cut"])
def test_a_resumed_run_exports_the_adapters_of_its_best_evaluation(run, finished, state):
    best = checkpoint.read_progress(run / "checkpoints", 2).best_update
    assert best, "the fixture has to find an update that is better than the base"
    if state == "missing":
        shutil.rmtree(run / "lora")
    elif state == "cut":
        (run / ADAPTERS).write_bytes((run / ADAPTERS).read_bytes()[:100])
    else:
        (run / ADAPTERS).write_bytes(b"of an earlier best")
    resume(run)
    assert same(adapters(run), adapters(finished))


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError("planted"), UserError("planted")])
def test_an_export_that_fails_loses_nothing(tmp_path, finished, monkeypatch, fault):
    with monkeypatch.context() as patch:

        def fail(*_):
            raise fault

        patch.setattr(FlowProcess, "save_lora", fail)
        with pytest.raises(fault if isinstance(fault, type) else type(fault)):
            train(small_run(tmp_path / "run", "updates=2", "evaluation.every=1"))
    run = tmp_path / "run"
    done = checkpoint.updates(run / "checkpoints")[-1]
    assert not (run / "lora").exists()
    resume(run, done)
    assert (run / ADAPTERS).exists()
    resume(run)
    assert same(weights(run, 2), weights(finished, 2))
    assert same(adapters(run), adapters(finished))


def test_adapters_of_an_update_that_is_done_again_go(run, monkeypatch):
    """The checkpoint of the best evaluation is gone, so that update is still to come."""
    shutil.rmtree(run / "checkpoints")

    def fail(*_, **__):
        raise UserError("planted")

    monkeypatch.setattr(FlowProcess, "draw", fail)
    config = RunConfig.load(run / "config.yaml", [f"out={run}", "tracking.preflight=skip"])
    with pytest.raises(UserError, match="planted"):
        train(config)
    assert not (run / "lora").exists()


@pytest.mark.parametrize("number", ["ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOLCK", "EINVAL", "EACCES", "EIO"])
def test_a_file_system_without_locks_is_warned_of(tmp_path, number):
    warned: list[str] = []
    with (tmp_path / ".lock").open("w") as file, failing(tmp_path, Fault(number, ("lock",))):
        assert lock(file, warned.append)
    assert len(warned) == 1
    assert "cannot be locked" in warned[0]


@pytest.mark.parametrize("number", ["EINVAL", "ENOTSUP", "ENOSYS", "EBADF", "EACCES"])
def test_a_file_system_that_does_not_flush_is_written_to(tmp_path, number):
    with failing(tmp_path, Fault(number, ("flush", "flush folder"))):
        write_text(tmp_path / "a.txt", "a")
        append_line(tmp_path / "b.jsonl", "{}")
    assert (tmp_path / "a.txt").read_text() == "a"
    assert (tmp_path / "b.jsonl").read_text() == "{}\n"


REWARD = "def mine(videos, prompts, **columns): return VALUES\n"
OTHER = {
    "{'a': range(len(prompts)), 'b': range(len(prompts))}": "the components a, b",
    "list(range(len(prompts)))": "a number",
}


@pytest.mark.parametrize(("now", "told"), OTHER.items())
def test_a_resumed_run_has_the_components_that_it_began_with(tmp_path, now, told):
    file = tmp_path / "mine.py"
    file.write_text(REWARD.replace("VALUES", "{'a': list(range(len(prompts)))}"), "utf-8")
    rewards = f"rewards={{agreement: null, persistence: null, background: null, mine: {{call: '{file}:mine'}}}}"
    run = train(small_run(tmp_path / "run", rewards, "updates=1", "tracking.preflight=skip", "evaluation.every=9"))
    file.write_text(REWARD.replace("VALUES", now), "utf-8")
    with pytest.raises(UserError, match=f"reward mine returned {told}, and at first the components a; a reward has"):
        resume(run)
    assert [line["update"] for line in read_lines(run / "metrics.jsonl")] == [1]


def test_a_base_line_that_lacks_videos_is_named(run):
    base, *later = read_lines(run / "evaluations.jsonl")
    lines = [{**base, "samples": base["samples"][:1]}, *later]
    write_text(run / "evaluations.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(UserError, match="the base model was scored on 1 held-out samples, and there are 2 now"):
        resume(run, 3)
