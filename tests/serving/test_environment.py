"""Environments of rewards: what they are made of, that they are there whole or not at all, and one made in earnest."""

import fcntl
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from flashgrpo.errors import UserError
from flashgrpo.scoring.names import full_name
from flashgrpo.serving import environment as module
from flashgrpo.serving.client import remote
from flashgrpo.serving.environment import (
    SHIPPED,
    Environment,
    requirements_of,
    script_requirements,
    server_requirements,
)

CHECKOUT = Path(__file__).parents[2]
BLOCK = """import torch
# /// script
# requires-python = ">=3.8"
# dependencies = [
#   "wcwidth==0.2.13",
#
#   "einops>=0.7",  # and why
# ]
# ///
"""


def test_requirements_of_a_file(tmp_path):
    assert script_requirements(BLOCK, "x.py") == ["wcwidth==0.2.13", "einops>=0.7"]
    assert script_requirements("import torch\n", "x.py") == []
    file = tmp_path / "mine.py"
    file.write_text(BLOCK)
    assert requirements_of(f"{file}:reward") == ["wcwidth==0.2.13", "einops>=0.7"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("# /// script\n# dependencies = 1\n# ///\n", "must be a list"),
        ("# /// script\n# dependencies = [1]\n# ///\n", "cannot be read"),
        ("# /// script\n# dependencies = ['a b c']\n# ///\n", "cannot be read"),
        ("# /// script\n# dependencies = [\n# ///\n", "cannot be read"),
        ("# /// script\n# dependencies = []\nimport os\n", "must end with a line"),
        ("# /// script\n# requires-python = '<3.8'\n# ///\n", r"needs Python <3\.8"),
        ("# /// script\n# requires-python = 3.8\n# ///\n", "cannot be read"),
        (BLOCK + BLOCK, "more than one block"),
    ],
)
def test_blocks_that_cannot_be_read(text, what):
    with pytest.raises(UserError, match=f"x.py.*{what}"):
        script_requirements(text, "x.py")


def test_names_without_requirements(tmp_path):
    assert requirements_of(full_name("jpeg:compressibility")) == []
    with pytest.raises(UserError, match="--requirements FILE"):
        requirements_of("mypackage.rewards:mine")
    with pytest.raises(UserError, match=r"nowhere\.py cannot be read"):
        requirements_of(f"{tmp_path}/nowhere.py:mine")


def test_short_names():
    assert full_name("clip:clip_score") == "flashgrpo.rewards.clip:clip_score"
    for name in ("mine:reward", "path/to/clip.py:reward", "http://127.0.0.1:1", "flashgrpo.rewards.clip:clip_score"):
        assert full_name(name) == name


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.txt")), ids=lambda file: file.stem)
def test_shipped_requirements_are_pinned_once(file):
    assert (SHIPPED.parent / f"{file.stem}.py").is_file()
    lines = [Requirement(line) for line in requirements_of(f"flashgrpo.rewards.{file.stem}:x")]
    assert lines
    assert all(str(line.specifier).startswith("==") for line in lines)
    for python in ("3.10", "3.11", "3.13"):
        wanted = [r.name for r in lines if not r.marker or r.marker.evaluate({"python_version": python})]
        assert len(wanted) == len(set(wanted)) == len({line.name for line in lines})


def test_the_server_adds_what_it_needs():
    lines = {Requirement(line).name: line for line in server_requirements([])}
    assert lines["torch"] == f"torch=={torch.__version__.partition('+')[0]}"
    assert lines["numpy"].startswith("numpy>=")
    assert {"fastapi", "uvicorn", "httpx", "tenacity"} <= set(lines)
    assert not {"diffusers", "transformers", "peft"} & set(lines)
    rest = [Requirement(line).name for line in server_requirements(["Torch==2.6.0", "# numpy", "imageio_ffmpeg"])]
    assert set(lines) - set(rest) == {"torch", "imageio-ffmpeg"}  # the reward's own come first


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """An environment of nothing: its packages are not installed, and `.steps` has what would have been run."""
    monkeypatch.setenv("FLASHGRPO_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "mine.py"
    file.write_text(BLOCK)
    steps = []

    def run(self, command, log) -> None:
        steps.append(command[-1] if "install" not in command else "install")
        if "venv" in command:
            subprocess.run([*command, "--without-pip"], check=True)
        if "install" in command and (tmp_path / "broken").exists():
            raise UserError("planted")
        time.sleep(0.05)

    monkeypatch.setattr(Environment, "_run", run)
    made = Environment.of(f"{file}:reward")
    return made, steps, tmp_path


def test_names_of_environments(plain):
    made, _, folder = plain
    assert made.folder.parent == folder / "cache/environments"
    assert made.folder.name.startswith("mine-")
    file = folder / "mine.py"
    assert Environment.of(f"{file}:another") == Environment(f"{file}:another", made.folder, made.requirements)
    versions = folder / "versions.txt"
    versions.write_text("numpy==1\nwcwidth==9\n# why\n")
    constrained = Environment.of(f"{file}:reward", constraint=versions)
    assert constrained.constraints == ("numpy==1", "# why")  # the reward's own pin is stronger
    assert constrained.folder != made.folder
    other = folder / "other.txt"
    other.write_text("einops\n")
    assert Environment.of(f"{file}:reward", requirements=other).requirements[0] == "einops"
    with pytest.raises(UserError, match=r"--constraint: .* cannot be read: No such file"):
        Environment.of(f"{file}:reward", constraint=folder / "nowhere.txt")


def test_an_environment_is_made_once_and_whole(plain):
    made, steps, folder = plain
    (folder / "broken").touch()
    with pytest.raises(UserError, match="planted"):
        made.hold()
    assert not made.is_whole
    (folder / "broken").unlink()
    (made.folder / "left over").touch()
    os.close(made.hold())
    assert made.is_whole
    assert not (made.folder / "left over").exists()
    assert (made.folder / "requirements.txt").read_text().startswith("wcwidth==0.2.13\neinops>=0.7\ntorch==")
    links = [path for path in made.folder.rglob("flashgrpo") if path.is_symlink()]
    assert [link.resolve() for link in links] == [Path(module.PACKAGE).resolve()]
    count = len(steps)
    os.close(made.hold())
    assert len(steps) == count
    os.close(made.hold(rebuild=True))
    assert len(steps) > count


def test_two_starts_at_once_make_one(plain):
    made, steps, _ = plain
    held = []
    starts = [threading.Thread(target=lambda: held.append(made.hold())) for _ in range(2)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert steps.count("install") == 1
    with pytest.raises(UserError, match=r"--rebuild: .* is in use; stop the server"):
        made.hold(rebuild=True)
    for lock in held:
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)
    os.close(made.hold(rebuild=True))


REWARD = """# /// script
# dependencies = ["wcwidth==0.2.13"]
# ///
import importlib.metadata
import importlib.util

import wcwidth


def seen(videos, prompts, **columns):
    absent = [importlib.util.find_spec(name) is None for name in ("diffusers", "transformers", "pytest")]
    version = [float(part) for part in importlib.metadata.version("wcwidth").split(".")]
    return {
        "minor": [version[1]] * len(prompts),
        "patch": [version[2]] * len(prompts),
        "absent": [float(sum(absent))] * len(prompts),
        "brightness": videos.mean(dim=(1, 2, 3, 4)),
    }
"""


@pytest.mark.slow
def test_another_version_runs_beside_the_trainers(tmp_path):
    """In earnest: a virtual environment with torch in it, made by the command, and used again by a second start."""
    assert importlib.metadata.version("wcwidth") != "0.2.13"
    (tmp_path / "mine.py").write_text(REWARD)
    command = [sys.executable, "-m", "flashgrpo", "reward", "env", f"{tmp_path}/mine.py:seen", "--port", "0"]
    command += ["--constraint", str(CHECKOUT / "constraints.txt")]
    surroundings = {**os.environ, "FLASHGRPO_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(CHECKOUT)}
    try:
        for start in range(2):
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings, cwd=tmp_path
            ) as process:
                line = process.stdout.readline()
                assert line.startswith("serving "), process.stderr.read()
                values = remote(line.split()[-1])(torch.full((3, 2, 3, 4, 4), 0.2), ["p"] * 3)
                if start == 0:
                    again = subprocess.run([*command, "--rebuild"], capture_output=True, text=True, env=surroundings)
                    assert again.returncode == 2
                    assert "is in use; stop the server in it first" in again.stderr
                process.send_signal(signal.SIGTERM)
                _, said = process.communicate(timeout=300)
            assert process.returncode == 0
            assert values.pop("brightness") == pytest.approx([0.2] * 3)
            assert values == {"minor": [2.0] * 3, "patch": [13.0] * 3, "absent": [3.0] * 3}
            assert ("this can take minutes" in said) == (start == 0)
    finally:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # it has 1.4 GB
