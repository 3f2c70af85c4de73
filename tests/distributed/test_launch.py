"""torchrun itself: the command that people type, and what they see."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from flashgrpo.run.lines import read_lines

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "flashgrpo"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_torchrun_trains_one_run(make_run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_run("updates=2", "parallel.shard=2").to_yaml(), "utf-8")
    done = subprocess.run([*TORCHRUN, "train", str(recipe)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "run")]
    assert [line["update"] for line in read_lines(tmp_path / "run/metrics.jsonl")] == [1, 2]


def test_bad_input_is_one_sentence_under_torchrun(make_run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_run("model.path=/nowhere").to_yaml(), "utf-8")
    done = subprocess.run([*TORCHRUN, "train", str(recipe)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("flashgrpo: model.path: there is no folder /nowhere") == 1
    assert "model.path: there is no folder /nowhere" in done.stderr[-600:], "where torchrun's own lines end"


def test_the_slurm_example_calls_torchrun(tmp_path):
    """With stand-ins for Slurm's own commands."""
    for name, body in (("scontrol", "echo node1\necho node2"), ("srun", 'echo "$@"')):
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    example = Path(__file__).parents[2] / "examples/slurm.sh"
    told = subprocess.run(
        [shutil.which("bash"), str(example), "recipe.yaml", "updates=3"],
        env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for part in ("--nnodes 2", "--nproc-per-node 8", "--rdzv-backend c10d", "--rdzv-endpoint node1:20007"):
        assert part in told
    assert told.strip().endswith("-m flashgrpo train recipe.yaml updates=3")
