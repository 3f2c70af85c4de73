"""Every mistake a user makes at the command line: one sentence, exit code 2, no traceback, nothing half-written."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flashgrpo.cli import main
from flashgrpo.run import checkpoint
from flashgrpo.run.directory import read_lines
from tools.tiny.build import WEIGHTS


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process: (exit code, what it printed, what it complained about)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashgrpo", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, " ".join(err.split())

    return run


@pytest.fixture
def recipe(make_run, tmp_path):
    """A small recipe on disk, with changes as a nested mapping."""

    def write(**changes: object) -> Path:
        tree = yaml.safe_load(make_run().to_yaml())
        for key, value in changes.items():
            branch, *leaf = key.split("__")
            if leaf:
                tree[branch][leaf[0]] = value
            else:
                tree[branch] = value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree), "utf-8")
        return path

    return write


def refused(result: tuple[int, str, str], sentence: str) -> None:
    code, _, complaint = result
    assert code == 2
    assert sentence in complaint
    assert "flashgrpo: " in complaint
    assert "Traceback" not in complaint


def test_settings(command, recipe, tmp_path):
    refused(command("train", recipe(), "updatse=3"), "unknown key updatse; did you mean 'updates'?")
    refused(command("train", recipe(), "rollout.group_size=1"), "rollout.group_size")
    refused(command("train", recipe(), "algorithm.steps.window=[0.0,2.0]"), "window of OneStep")
    refused(command("config", tmp_path / "none.yaml"), "there is no recipe")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b"", "has no prompts"),
        ("blank.txt", b"\n  \n", "has no prompts"),
        ("latin.txt", "a caf\xe9\n".encode("latin-1"), "is not UTF-8 (byte 5)"),
        ("odd.md", b"a\n", "must end in .txt, .jsonl, .csv, .parquet"),
        ("keyless.csv", b"text,n\na,1\n", 'line 2 must be an object with a text under "prompt"'),
        ("long.csv", b"prompt,n\na,1,2\n", "line 2 has another number of fields"),
        ("short.csv", b"prompt,n\na\n", "line 2 has another number of fields"),
        ("header.csv", b"prompt,n\n", "has no prompts"),
        ("bad.parquet", b"PAR0", "bad.parquet"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 is no JSON"),
        ("keyless.jsonl", b'{"text": "a"}\n', 'must be an object with a text under "prompt"'),
        (
            "\u2028.jsonl",
            '\ufeff{"prompt": "a\u2028b", "n": 1}\n{"prompt": "b"}\n'.encode(),
            "prompt 2 has other columns",
        ),
        ("uneven.jsonl", b'{"prompt": "a", "n": 1}\n{"prompt": "b"}\n', "prompt 2 has other columns"),
        ("missing.txt", None, "cannot be read: no such file"),
    ],
)
def test_prompt_files(command, recipe, tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(command("train", recipe(prompts__train=str(tmp_path / name))), sentence)
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_the_reward_does_not_understand(command, recipe, tmp_path):
    (tmp_path / "odd.txt").write_text("something else entirely\n")
    refused(command("train", recipe(prompts__train=str(tmp_path / "odd.txt"))), "something else entirely")


def test_model_folders(command, recipe, tmp_path):
    refused(command("train", recipe(model__path=str(tmp_path / "nowhere"))), "model.path: there is no folder")
    (tmp_path / "empty").mkdir()
    refused(command("train", recipe(model__path=str(tmp_path / "empty"))), "is no diffusers pipeline")
    (tmp_path / "empty/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    refused(command("train", recipe(model__path=str(tmp_path / "empty"))), "StableDiffusionPipeline, which is not")
    (tmp_path / "empty/model_index.json").write_text("{")
    refused(command("train", recipe(model__path=str(tmp_path / "empty"))), "is no readable model_index.json")
    refused(command("train", recipe(model__path="nobody/nothing")), "could not be had from the hub")
    assert not (tmp_path / "run").exists()


def test_a_pipeline_with_damaged_weights(command, recipe, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(WEIGHTS, folder)
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(command("train", recipe(model__path=str(folder))), "could not be loaded as a WanPipeline")


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ({"model__height": 50}, "model.height: 50 is no multiple of 16; the nearest is 48"),
        ({"model__num_frames": 8}, "model.num_frames: 8 is no multiple of 4 plus 1; the nearest is 9"),
        ({"model__train": {"kind": "lora", "targets": ["to_z"]}}, "match no linear layer"),
    ],
)
def test_sizes_and_targets(command, recipe, size, sentence):
    refused(command("train", recipe(**size)), sentence)


REWARDS = """
calls = 0
def few(videos, prompts, **columns): return [1.0]
def nan(videos, prompts, **columns): return [float("nan")] * len(prompts)
def inf(videos, prompts, **columns): return [float("inf")] * len(prompts)
def none(videos, prompts, **columns): return {}
def narrow(videos, prompts): return [1.0] * len(prompts)
def changes(videos, prompts, **columns): return videos.mul_(2).mean((1, 2, 3, 4))
def text(videos, prompts, **columns): return ["good"] * len(prompts)
def later(videos, prompts, **columns):
    global calls
    calls += 1
    return [float(len(prompts) + i) if calls < 14 else float("nan") for i in range(len(prompts))]
"""


GOOD = """
def {}(videos, prompts, threshold=0.5, **columns): return [threshold] * len(prompts)
"""


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("few", "reward mine has 1 numbers for 2 videos"),
        ("nan", "reward mine is nan for video 0"),
        ("inf", "reward mine is inf for video 0"),
        ("text", "reward mine must be 2 numbers"),
        ("none", "reward mine returned an empty mapping"),
        ("changes", "changed the videos in place"),
        ("gone", "has no function 'gone'"),
    ],
)
def test_rewards(command, recipe, tmp_path, function, sentence):
    (tmp_path / "mine.py").write_text(REWARDS)
    path = recipe(rewards={"mine": {"call": f"{tmp_path}/mine.py:{function}"}}, updates=1)
    refused(command("train", path), sentence)
    if (tmp_path / "run").exists():  # the mended recipe starts in the same folder
        (tmp_path / "mine.py").write_text(REWARDS.replace(f"def {function}(", "def bad(") + GOOD.format(function))
        assert command("train", path)[0] == 0


def test_reward_arguments(command, recipe, tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS + GOOD.format("good"))
    call = {"call": f"{tmp_path}/mine.py:good"}
    refused(command("train", recipe(rewards={"mine": {**call, "args": {"treshold": 1}}})), "did you mean 'threshold'?")
    narrow = {"call": f"{tmp_path}/mine.py:narrow"}
    refused(command("train", recipe(rewards={"mine": narrow})), "give it a **columns parameter")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ("nothing", "must have the form"),
        ("no.such.module:f", "cannot be imported"),
        ("/no/such/file.py:f", "there is no file"),
        ("flashgrpo.rewards.shapes:agrement", "did you mean 'agreement'?"),
    ],
)
def test_reward_names(command, recipe, call, sentence):
    refused(command("train", recipe(rewards={"mine": {"call": call}})), sentence)


def test_a_reward_that_fails_later_loses_nothing(command, recipe, tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    path = recipe(
        rewards={"mine": {"call": f"{tmp_path}/mine.py:later"}}, updates=9, evaluation__every=9, checkpoint__every=9
    )
    refused(command("train", path), "reward mine is nan")
    done = len(read_lines(tmp_path / "run/metrics.jsonl"))
    assert done >= 3
    assert checkpoint.updates(tmp_path / "run/checkpoints") == [done]


def test_run_directories(command, recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    refused(command("train", recipe()), "holds 'thesis.tex' and is no run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    (tmp_path / "run/config.yaml").mkdir()
    refused(command("train", recipe()), "is no run")
    (tmp_path / "run/config.yaml").rmdir()
    for name in ("evaluate", "report"):
        refused(command(name, tmp_path / "run"), "is no run directory")
    refused(command("sample", tmp_path / "run", "a"), "is no run directory")
    (tmp_path / "file").write_text("")
    refused(command("train", recipe(out=str(tmp_path / "file"))), "cannot write")
    refused(command("train", recipe(out=str(tmp_path / "file/below"))), "cannot write")


def test_a_run_with_other_settings_is_not_continued(command, recipe):
    assert command("train", recipe(updates=1))[0] == 0
    refused(command("train", recipe(updates=2, optim__lr=0.5)), "is a run with another optim.lr")
    assert command("train", recipe(updates=2))[0] == 0


def test_damaged_checkpoints(command, recipe, tmp_path):
    assert command("train", recipe(updates=2))[0] == 0
    for folder in (tmp_path / "run/checkpoints").iterdir():
        (folder / "state.json").write_text("{")
    refused(command("train", recipe(updates=3)), "no checkpoint in")
    refused(command("evaluate", tmp_path / "run"), "is not whole")


def test_a_full_disk(recipe, tmp_path):
    """A limit on file size stands in for a full disk: the same refusal in the middle of the same write."""
    path = recipe(updates=3)
    limited = subprocess.run(
        [sys.executable, "-c", "from flashgrpo.cli import main; main()", "train", str(path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
        capture_output=True,
        text=True,
    )
    assert limited.returncode == 2
    assert "Traceback" not in limited.stderr
    assert "cannot write" in limited.stderr.splitlines()[-1]
    assert not list((tmp_path / "run").rglob(".partial*"))
    assert [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    again = subprocess.run([sys.executable, "-c", "from flashgrpo.cli import main; main()", "train", str(path)])
    assert again.returncode == 0


def test_usage_errors_have_exit_code_2(command):
    assert command("tran")[0] == 2
    assert command("demo", "--seed", "-1")[0] == 2
    assert command("sample")[0] == 2
