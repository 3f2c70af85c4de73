"""The settings of every part, the package and the command line come without torch, and so answer within a second."""

import subprocess
import sys
from pathlib import Path

import pytest

import flashgrpo

SOURCE = Path(flashgrpo.__file__).parent
SETTINGS = sorted(
    ".".join(("flashgrpo", *file.relative_to(SOURCE).with_suffix("").parts)) for file in SOURCE.rglob("settings.py")
)
HEAVY = ("torch", "diffusers", "transformers", "peft", "scipy", "sympy", "matplotlib", "imageio")


def imported(*modules: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has after it has imported some modules."""
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert set(modules) <= set(loaded)
    return set(HEAVY) & set(loaded)


def test_every_part_has_its_settings():
    parts = {name.split(".")[1] for name in SETTINGS} - {"settings"}
    assert parts >= {"config", "distributed", "learning", "models", "processes", "scoring"}


@pytest.mark.parametrize("module", ["flashgrpo", "flashgrpo.config", "flashgrpo.cli", "flashgrpo.presets", *SETTINGS])
def test_it_comes_without_torch(module):
    assert imported(module) == set()


def test_all_of_them_together_and_a_recipe_come_without_torch():
    code = "import sys; from flashgrpo import RunConfig, train, evaluate, presets; from flashgrpo import cli\n"
    code += "RunConfig.load('tiny', ['algorithm.kl_coef=0.1']).to_yaml(); RunConfig.model_json_schema()\n"
    done = subprocess.run([sys.executable, "-c", f"{code}print(*sys.modules)"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not set(HEAVY) & set(done.stdout.split())
    assert imported(*SETTINGS) == set()


def test_the_heavy_ones_would_be_noticed():
    assert imported("flashgrpo.types") >= {"torch"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["-h"],
        ["--version"],
        ["train", "--help"],
        ["config", "tiny"],
        ["schema"],
        ["list"],
        ["trian"],
        ["train", "tiny", "optim.lrr=1"],
        ["--show-completion", "bash"],
    ],
)
def test_commands_that_compute_nothing_come_without_torch(arguments):
    code = (
        "import sys; from flashgrpo.cli import main; sys.argv[0] = 'flashgrpo'\ntry: main()\nexcept SystemExit: pass\n"
    )
    code += "print('modules', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    said, _, modules = done.stdout.rpartition("modules")
    assert said.strip() or done.stderr.strip()
    assert "flashgrpo.cli" in modules
    assert not set(HEAVY) & set(modules.split())
