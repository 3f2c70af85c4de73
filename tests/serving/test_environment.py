"""Environments of rewards: what they are made of, that they are there whole or not at all, and one made in earnest."""

import errno
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

import flashgrpo
from flashgrpo.errors import UserError
from flashgrpo.scoring.names import full_name
from flashgrpo.serving import environment as module
from flashgrpo.serving.client import remote
from flashgrpo.serving.commands import Options
from flashgrpo.serving.environment import (
    SHIPPED,
    Environment,
    link_torch,
    pip_settings,
    requirements_of,
    script_requirements,
    server_requirements,
    start,
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
    assert requirements_of(full_name("jpeg:compressibility")) == []


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
    assert lines["torch"] == f"torch=={importlib.metadata.version('torch')}"  # its build too: +cpu, +cu130
    assert lines["numpy"].startswith("numpy>=")
    assert {"fastapi", "uvicorn", "httpx"} <= set(lines)
    assert not {"diffusers", "transformers", "peft"} & set(lines)
    rest = [Requirement(line).name for line in server_requirements(["Torch==2.6.0", "# numpy", "imageio_ffmpeg"])]
    assert set(lines) - set(rest) == {"torch", "imageio-ffmpeg"}  # the reward's own come first


WHAT_IS_THERE = """
import os, importlib.metadata, importlib.util
print(*(os.path.realpath(importlib.util.find_spec(name).origin) for name in ("flashgrpo", "torch")))
print(importlib.metadata.version("torch"))
"""


def test_the_trainers_torch_is_linked_with_what_it_is_made_of(tmp_path, monkeypatch):
    """What it pins (CUDA, triton), and what these pin, is one build with it; the rest is any that fits."""
    installed, place, links = tmp_path / "installed", tmp_path / "site-packages", tmp_path / "links"
    needs = {
        "torch-9.9+mine": ["cuda-meta[blas]==13.0 ; platform_system == 'Linux'", "mine-absent==1", "sympy>=1.13"],
        "cuda_meta-13.0": ["mine-blas==13.0.* ; extra == 'blas'"],
        "mine_blas-13.0.2": [],
    }
    for name, lines in needs.items():
        folder, (top, version) = installed / f"{name}.dist-info", name.split("-")
        folder.mkdir(parents=True)
        (installed / top).mkdir()
        wanted = "".join(f"Requires-Dist: {line}\n" for line in lines)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {top}\nVersion: {version}\n{wanted}")
        (folder / "RECORD").write_text(f"{top}/__init__.py,,\n{name}.dist-info/METADATA,,\n../../bin/{top},,\n")
    monkeypatch.syspath_prepend(installed)
    place.mkdir()
    links.mkdir()
    link_torch(place, links)
    assert {link.name: link.resolve() for link in links.iterdir()} == {
        name: installed / name for name in ("torch", "cuda_meta", "mine_blas")
    }
    assert {folder.name for folder in place.iterdir()} == {f"{name}.dist-info" for name in needs}
    assert {(folder / "RECORD").read_text() for folder in place.iterdir()} == {
        ""
    }  # uv deletes nothing of the trainer's


def test_what_pip_is_told_is_told_to_uv(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = http://user:secret@one/simple\nextra-index-url =\n  http://two\n  http://three\n"
        "cert = /etc/my certs.pem\ntrusted-host = one two\n[install]\nconstraint = a.txt b.txt\nno-index = yes\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels /more")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "http://four")  # counts more than a file
    variables, options = pip_settings()
    assert options == ["--no-index"]
    assert variables == {
        "UV_DEFAULT_INDEX": "http://user:secret@one/simple",
        "UV_INDEX": "http://four",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_CONSTRAINT": "a.txt b.txt",
        "UV_INSECURE_HOST": "one two",
        "SSL_CERT_FILE": "/etc/my certs.pem",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    file.write_text("no settings\n")
    with pytest.raises(UserError, match=r"pip cannot read its settings: .*pip\.conf"):
        pip_settings()


def test_what_cannot_be_had_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHGRPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "mine.py").write_text(BLOCK)
    with pytest.raises(
        UserError, match=r"cannot be made: No solution found .* cause: Because .* \(all of it: .*\.log\)"
    ):
        Environment.of(f"{tmp_path}/mine.py:reward").hold()
    monkeypatch.setenv("FLASHGRPO_CACHE", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/environments").touch()
    with pytest.raises(UserError, match=r"cannot write .*/environments/mine-.*: file exists"):
        Environment.of(f"{tmp_path}/mine.py:reward").hold()


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """An environment of nothing: its packages are not installed, and `.steps` has what would have been run."""
    monkeypatch.setenv("FLASHGRPO_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "mine.py"
    file.write_text(BLOCK)
    steps = []

    def run(self, command, log, settings) -> None:
        steps.append(command[-1] if "install" not in command else "install")
        if "venv" in command:
            subprocess.run([*command, "--quiet"], check=True)
        if "install" in command and (tmp_path / "broken").exists():
            raise UserError("planted")
        time.sleep(0.05)

    monkeypatch.setattr(Environment, "_run", run)
    monkeypatch.setattr(module, "pip_settings", lambda: ({}, []))
    made = Environment.of(f"{file}:reward")
    return made, steps, tmp_path


def test_names_of_environments(plain):
    made, _, folder = plain
    assert made.folder.parent == folder / "cache/environments"
    assert made.folder.name.startswith("mine-")
    file = folder / "mine.py"
    assert Environment.of(f"{file}:another") == Environment(f"{file}:another", made.folder, made.requirements)
    other = folder / "other.txt"
    other.write_text("einops\n")
    replaced = Environment.of(f"{file}:reward", requirements=other)
    assert replaced.requirements[0] == "einops"
    assert replaced.folder != made.folder


def test_without_uv_the_command_that_installs_it_is_told(plain, monkeypatch):
    made, steps, _ = plain
    monkeypatch.setitem(sys.modules, "uv", None)
    with pytest.raises(UserError, match=r"`flashgrpo reward env` needs uv: pip install -e '.*\[server\]'"):
        made.hold()
    assert not steps
    assert not made.is_whole


def test_an_environment_is_made_once_and_whole(plain):
    made, steps, folder = plain
    (folder / "broken").touch()
    with pytest.raises(UserError, match="planted"):
        made.hold()
    assert not made.is_whole
    (folder / "broken").unlink()
    (made.folder / "left over").touch()
    made.hold().close()
    assert made.is_whole
    assert not (made.folder / "left over").exists()
    assert (made.folder / "requirements.txt").read_text().startswith("wcwidth==0.2.13\neinops>=0.7\ntorch==")
    asked = [made.python, "-c", WHAT_IS_THERE]
    seen = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    assert seen == [flashgrpo.__file__, torch.__file__, torch.__version__]  # the trainer's build itself
    count = len(steps)
    made.hold().close()
    assert len(steps) == count
    made.hold(rebuild=True).close()
    assert len(steps) > count


def test_options_reach_the_server_an_empty_name_of_a_variable_too(plain, monkeypatch):
    """What is empty is refused there, and never taken for none, which serves without a token."""
    made, _, folder = plain
    told = []
    monkeypatch.setattr(os, "execv", lambda *command: told.append(command))
    with open(folder / "lock", "w") as file:
        monkeypatch.setattr(Environment, "hold", lambda self, rebuild: file)
        for token_env in ("", None):
            start(made, ["a=1"], Options("0.0.0.0", 1, 2, 3, 4.5, token_env))
        assert os.get_inheritable(file.fileno())
    options = "--host=0.0.0.0 --port=1 --batch=2 --queue=3 --max-mib=4.5"
    rest = f"-- {folder}/mine.py:reward a=1"
    assert [" ".join(words).partition("reward serve ")[2] for _, words in told] == [
        f"{options} --token-env= {rest}",
        f"{options} {rest}",
    ]


def test_a_file_system_without_locks_costs_a_warning(plain, monkeypatch, caplog):
    def refuse(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    made, steps, _ = plain
    made.hold().close()
    assert steps.count("install") == 1
    assert caplog.text.count("cannot be locked (no locks available)") >= 1
    made.hold(rebuild=True).close()
    assert steps.count("install") == 2


def test_two_starts_at_once_make_one(plain):
    made, steps, _ = plain
    held = []
    threads = [threading.Thread(target=lambda: held.append(made.hold())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps.count("install") == 1
    with pytest.raises(UserError, match=r"--rebuild: .* is in use; stop the server"):
        made.hold(rebuild=True)
    for file in held:
        file.close()
    made.hold(rebuild=True).close()


REWARD = """# /// script
# dependencies = ["wcwidth==0.2.13"]
# ///
import importlib.metadata
import importlib.util

import torch
import wcwidth


def seen(videos, prompts, **columns):
    absent = [importlib.util.find_spec(name) is None for name in ("diffusers", "transformers", "pytest")]
    version = [float(part) for part in importlib.metadata.version("wcwidth").split(".")]
    return {
        "torch": [float(torch.__version__ == prompt) for prompt in prompts],
        "minor": [version[1]] * len(prompts),
        "patch": [version[2]] * len(prompts),
        "absent": [float(sum(absent))] * len(prompts),
        "brightness": videos.mean(dim=(1, 2, 3, 4)),
    }
"""


@pytest.mark.slow
def test_another_version_runs_beside_the_trainers(tmp_path):
    """In earnest: an environment with the trainer's torch in it, made by the command, and used by a second start."""
    assert importlib.metadata.version("wcwidth") != "0.2.13"
    (tmp_path / "mine.py").write_text(REWARD)
    command = [sys.executable, "-m", "flashgrpo", "reward", "env", f"{tmp_path}/mine.py:seen", "--port", "0"]
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines(keepends=True)
    versions = tmp_path / "versions.txt"
    versions.write_text("".join(line for line in lines if not line.startswith("wcwidth==")))
    surroundings = {**os.environ, "FLASHGRPO_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(CHECKOUT)}
    surroundings["PIP_CONSTRAINT"] = str(versions)
    try:
        for start in range(2):
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings, cwd=tmp_path
            ) as process:
                line = process.stdout.readline()
                assert line.startswith("serving "), process.stderr.read()
                values = remote(line.split()[-1])(torch.full((3, 2, 3, 4, 4), 0.2), [torch.__version__] * 3)
                if start == 0:
                    again = subprocess.run([*command, "--rebuild"], capture_output=True, text=True, env=surroundings)
                    assert again.returncode == 2
                    assert "is in use; stop the server in it first" in again.stderr
                process.send_signal(signal.SIGTERM)
                _, said = process.communicate(timeout=300)
            assert process.returncode == 0
            assert values.pop("brightness") == pytest.approx([0.2] * 3)
            assert values == {"torch": [1.0] * 3, "minor": [2.0] * 3, "patch": [13.0] * 3, "absent": [3.0] * 3}
            assert ("this can take minutes" in said) == (start == 0)
    finally:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # it has 0.5 GB
