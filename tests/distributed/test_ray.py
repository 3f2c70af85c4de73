"""The second launcher: two Ray workers do what two processes of torchrun do. Needs the extra `ray`."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from typer.testing import CliRunner

from flashgrpo.cli import app
from flashgrpo.errors import install_hint
from flashgrpo.run.lines import read_lines


def test_without_ray_one_sentence_says_how_to_get_it(make_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_run().to_yaml(), "utf-8")
    result = CliRunner().invoke(app, ["train", str(recipe), "--ray-workers", "2"])
    assert f"needs Ray: {install_hint('ray')}" in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_two_workers_train_one_run(make_run, tmp_path, nursery):
    if not find_spec("ray"):  # not imported: whatever it starts in this process would stay for other tests
        pytest.skip("needs the extra ray")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_run("updates=2", "optim.micro_batch=1").to_yaml(), "utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_V2_ENABLED": "1"}
    command = [sys.executable, "-m", "flashgrpo", "train", str(recipe), "--ray-workers", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith(str(tmp_path / "run"))
    assert json.loads((tmp_path / "run/environment.json").read_text())["processes"] == 2
    nursery.run("train", recipe, f"out={tmp_path}/torchrun", size=2)
    lines, expected = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("run", "torchrun"))
    assert [line["reward"] for line in lines] == [line["reward"] for line in expected]
