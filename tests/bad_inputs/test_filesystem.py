"""Every command on a file system that fails: one sentence or a warning, nothing lost, and equal weights afterwards.

A process that joins is a line of RUNS; the faults are those of `tests/filesystem.py`.
"""

import shutil
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from flashgrpo.config import RunConfig
from flashgrpo.run import checkpoint
from flashgrpo.run.lines import read_lines
from flashgrpo.train import train
from tests.conftest import small_run
from tests.end_to_end.test_train import assert_same_run
from tests.filesystem import Disk, Fault, bad_write, failing, limited, no_space, read_only, unreadable

SHORT = ("updates=10", "evaluation.every=5", "evaluation.videos=1", "evaluation.num_steps=2", "tracking.preflight=skip")
SIZE = ("rollout.num_steps=3", "model.height=32", "model.width=32", "model.num_frames=1")
JPEG = "rewards={jpeg: {call: 'flashgrpo.rewards.jpeg:compressibility'}, agreement: null, persistence: null}"
SCORE = "algorithm.score={draw: grid, times: 1, window: [0.01, 1.0]}"
AVERAGED = ("algorithm=awm", SCORE, "optim.lr=3e-2")  # re-noised, with an average beside the weights
RUNS = {"flow": (*SHORT, *SIZE, JPEG), "re-noised": (*SHORT, *SIZE, JPEG, *AVERAGED)}


@dataclass(frozen=True)
class Trained:
    """A run of a process that nothing disturbed."""

    settings: tuple[str, ...]
    run: Path

    def recipe(self, out: Path) -> Path:
        """Write the recipe of the same run into another folder."""
        file = out.parent / "recipe.yaml"
        file.write_text(small_run(out, *self.settings).to_yaml(), "utf-8")
        return file


@pytest.fixture(scope="module", params=RUNS)
def whole(request, tmp_path_factory) -> Trained:
    out = tmp_path_factory.mktemp("whole") / "run"
    return Trained(RUNS[request.param], train(small_run(out, *RUNS[request.param])))


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole.run, tmp_path / "run"))


@pytest.fixture
def attempt(command, tmp_path) -> Callable[..., str]:
    """Run a command in a fault that it cannot get over: it has to end with one sentence, which is returned."""

    def run(context: AbstractContextManager[Disk | None], *arguments: object) -> str:
        with context as disk:
            code, _, complaint = command(*arguments)
        assert disk is None or disk.refused
        assert code == 2, complaint
        assert "Traceback" not in complaint
        assert complaint.count("flashgrpo: ") == 1
        return complaint.partition("flashgrpo: ")[2]

    return run


def assert_kept(run: Path, saved: bool = False) -> None:
    """Whatever is there is whole, and a part of the undisturbed run; where `saved`, all that was done is."""
    done = checkpoint.updates(run / "checkpoints")
    for update in done:
        checkpoint.read_progress(run / "checkpoints", update)
    lines = [line["update"] for line in read_lines(run / "metrics.jsonl")]
    assert lines == list(range(1, len(lines) + 1))
    assert not saved or max(done, default=0) == len(lines)


PLACES = (  # in the order of a run, of which a checkpoint that fails costs two updates
    *(".lock", "config.yaml", "environment.json", "videos/*", "evaluations.jsonl", "metrics.jsonl", "*.distcp"),
    *("*.metadata*", "lora*", "*state.json", "checkpoints/000008", "confirmation.json"),
)


def test_one_write_after_the_other_fails_and_the_run_ends_with_the_same_weights(whole, attempt, tmp_path, command):
    """Each kind of file once, with a start between: what was done before is kept each time."""
    out = tmp_path / "run"
    recipe = whole.recipe(out)
    for place in PLACES:
        sentence = attempt(failing(out, bad_write(place)), "train", recipe)
        assert sentence.startswith(f"cannot write {out}")
        assert sentence.strip().endswith("input/output error")
        assert_kept(out, saved=True)
    assert command("train", recipe)[0] == 0
    assert_same_run(out, whole.run, 10)


def test_a_file_system_without_locks_and_flushes_costs_a_warning(whole, tmp_path, command):
    out = tmp_path / "run"
    lacking = Fault("ENOTSUP", ("lock", "flush", "flush folder"))
    with failing(out, lacking) as disk:
        code, _, complaint = command("train", whole.recipe(out))
    assert code == 0, complaint
    assert {"lock .lock", "flush config.yaml", "flush folder ."} <= {*disk.refused}
    assert complaint.count("cannot be locked") == 1
    assert_same_run(out, whole.run, 10)


FAULTS = {  # a number is a limit of the operating system, which every library meets in the middle of a write
    "full": [no_space(), *(no_space(at) for at in PLACES[3:])],
    "read-only": [read_only(after) for after in (0, 8, 20)],
    "n-th write": [bad_write(after=after) for after in (6, 14, 22, 30)],
    "size": [0, 3000, 60_000, 300_000],
}


@pytest.mark.parametrize(
    ("whole", "faults"), [*(("flow", name) for name in FAULTS), ("re-noised", "full")], indirect=["whole"]
)
def test_faults_in_a_row_lose_nothing(whole, attempt, tmp_path, command, faults):
    out = tmp_path / "run"
    recipe = whole.recipe(out)
    for fault in FAULTS[faults]:
        attempt(limited(fault) if isinstance(fault, int) else failing(out, fault), "train", recipe)
        assert_kept(out, saved=isinstance(fault, Fault) and fault.times == 1)
    assert command("train", recipe)[0] == 0
    assert_same_run(out, whole.run, 10)


# ---- what reads a run ------------------------------------------------------------------------------------------------


def test_an_evaluation_writes_nothing_into_a_run(whole, command):
    with failing(whole.run, read_only()) as disk:
        code, _, complaint = command("evaluate", whole.run)
    assert code == 0, complaint
    assert not disk.refused


WRITE = {
    "export": [read_only(), no_space(), bad_write(), bad_write("*README*")],
    "report": [read_only(), no_space(), bad_write("*.html", after=1)],
}


@pytest.mark.parametrize("name", WRITE)
def test_what_writes_into_a_run_leaves_it_as_it_was(whole, copy, attempt, command, name):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for fault in WRITE[name]:
        attempt(failing(copy, fault), name, copy)
        assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert command(name, copy)[0] == 0


FILES = ("config.yaml", "environment.json", "evaluations.jsonl", "*state.json", "*.metadata", "*.distcp")
READ = {
    "train": (*FILES, "metrics.jsonl"),
    "evaluate": FILES,
    "export": FILES,
    "report": ("config.yaml", "metrics.jsonl", "evaluations.jsonl"),
}


@pytest.mark.parametrize("name", READ)
def test_a_file_that_cannot_be_read_is_named_and_kept(copy, attempt, name):
    told = ("config.yaml", "environment.json")  # by each start
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name not in told}
    arguments = [name, copy / "config.yaml", "updates=11", f"out={copy}"] if name == "train" else [name, copy]
    for file in READ[name]:
        sentence = attempt(failing(copy, unreadable(file)), *arguments)
        assert str(copy) in sentence
        assert {path: path.read_bytes() for path in before} == before


# ---- comparisons -----------------------------------------------------------------------------------------------------


class Here(subprocess.Popen):
    """A run of a comparison in this process; other programs are what they are."""

    def __init__(self, words: list[str], **options: object) -> None:
        self._code = None
        if "flashgrpo" not in words:
            super().__init__(words, **options)
        else:
            train(RunConfig.load(words[-1]))
            self._code = self.returncode = 0
            self._child_created = False

    def poll(self) -> int | None:
        return super().poll() if self._code is None else self._code


PARTS = (
    *(".lock", "plan.json", "*/seed-0.yaml", "*/seed-0.log"),
    *("comparison.json", "comparison.md", "figures", "report.html"),
)


@pytest.mark.parametrize("whole", ["flow"], indirect=True)
def test_a_comparison_goes_on_after_each_write_that_failed(whole, attempt, command, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", Here)
    recipe, folder = whole.recipe(tmp_path / "run"), tmp_path / "compared"
    options = ("--algorithms", "flash-grpo", "--seeds", 1, "--points", 2)
    code, _, complaint = command("compare", recipe, "--out", tmp_path / "undisturbed", *options)
    assert code == 0, complaint
    for part in PARTS:
        sentence = attempt(failing(folder, bad_write(part)), "compare", recipe, "--out", folder, *options)
        assert sentence.startswith(f"cannot write {folder}")
    assert command("compare", recipe, "--out", folder, *options)[0] == 0
    assert_same_run(folder / "flash-grpo/seed-0", tmp_path / "undisturbed/flash-grpo/seed-0", 10)
    assert not list(folder.rglob(".partial-*"))
