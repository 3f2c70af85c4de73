"""Run directories that are none, are another's, or are damaged."""

import json
import resource
import subprocess
import sys

import pytest

from tests.bad_inputs.cases import Case
from tests.conftest import small_run

CASES = [
    Case("train RECIPE", "holds 'thesis.tex' and is no run", {"run/thesis.tex": "years of work"}),
    Case("train RECIPE", "holds 'config.yaml' and is no run", {"run/config.yaml/thesis.tex": ""}),
    Case("evaluate HERE/run", "is no run directory, for it has no config.yaml", {"run/thesis.tex": ""}),
    Case("report HERE/run", "is no run directory: it has no config.yaml", {"run/thesis.tex": ""}),
    Case("report HERE/run", "is no run directory: there is no such folder"),
    Case("sample HERE/run a", "run is no run directory", {"run/thesis.tex": ""}),
    Case("train RECIPE out=HERE/file", "cannot write", {"file": ""}),
    Case("train RECIPE out=HERE/file/below", "file/below: not a folder", {"file": ""}),
    Case("train RECIPE out=RUN updates=2 optim.warmup=5", "is a run with another optim.warmup (0, now 5)"),
    Case("train RECIPE out=RUN updates=2", "no checkpoint in", {"run/checkpoints/000001/state.json": "{"}),
    Case("train RECIPE", "RANK is 'x' where a launcher puts a whole number", env={"RANK": "x"}),
    Case("train RECIPE", "WORLD_SIZE is '-1'", env={"WORLD_SIZE": "-1"}),
    Case("train RECIPE", "RANK 3 of WORLD_SIZE 1", env={"RANK": "3"}),
    Case("evaluate RECIPE", "WORLD_SIZE is '1e9'", env={"WORLD_SIZE": "1e9"}),
    Case("compare RECIPE --out HERE/c", "WORLD_SIZE is 'many'", env={"WORLD_SIZE": "many"}),
    Case("evaluate RUN", "is not whole", {"run/checkpoints/000001/state.json": "{"}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_runs(refuse, case):
    refuse(case)


def test_a_full_disk(tmp_path):
    """A limit on file size stands in for a full disk: the same refusal in the middle of the same write."""
    path = tmp_path / "recipe.yaml"
    path.write_text(small_run(tmp_path / "run", "updates=3").to_yaml(), "utf-8")
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
