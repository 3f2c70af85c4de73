"""Every process and family on a stand-in for a GPU (tests/stand_in/): nothing is mixed, and hardly anything waits.

It runs in a process of its own, which one fixture starts and asks for one run after the other.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.families import KINDS
from tests.stand_in import lacking

ROOT = Path(__file__).parent.parent.parent
MISSING = lacking()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"the stand-in for a GPU needs {MISSING}")


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., dict[str, Any]]]:
    """Asks the process with the stand-in for a job of `tests/stand_in/runs.py`."""
    answers, end = os.pipe()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STAND_IN_ANSWERS": str(end)}
    command = [sys.executable, "-m", "tests.stand_in.runs"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[end], cwd=ROOT, env=environment, text=True)
    os.close(end)
    with open(answers) as told, process:

        def job(name: str, *arguments: Any, **settings: Any) -> dict[str, Any]:
            assert process.stdin is not None
            process.stdin.write(json.dumps([name, arguments, settings], default=str) + "\n")
            process.stdin.flush()
            line = told.readline()
            assert line, f"the process with the stand-in ended with code {process.wait()}"
            return json.loads(line)

        yield job
        assert process.stdin is not None
        process.stdin.close()


PROCESSES = [
    "flow: mix-grpo, normalized ratio",
    "flow: awm",
    "flow: diffusion-nft",
    "colour",
    "program",
    "addends with a penalty",
    "masked tokens: agrpo",
    "masked tokens: by entropy, guided, masked by divergence, a penalty",
    "uniform tokens",
    "uniform tokens: guesses of the sampler, with a penalty",
]
"""Of the conformance suite, one of each kind."""


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_runs_as_on_the_cpu(ask, name):
    from tests.stand_in import runs

    answer = ask("process", name)
    assert not answer["error"], answer["error"]
    assert answer["result"] == pytest.approx(runs.process(name), rel=1e-3, abs=1e-6)
    assert answer["result"]["drift"] == 0


@pytest.mark.parametrize("name", KINDS)
def test_a_family_runs(ask, name, tmp_path):
    """With experts in turns and in bfloat16, where there are two; nobody waits for what comes and goes."""
    settings = {"offload": True, "dtype": "bfloat16"} if "a14b" in name else {}
    answer = ask("family", name, tmp_path, **settings)
    assert not answer["error"], answer["error"]
    assert answer["result"]["drift"] == 0
    moved = [place for place in answer["waits"] if place.endswith(("residence.py:bring", "residence.py:place"))]
    assert not (moved and settings)


@pytest.mark.parametrize("name", ["llada", "amused"])
def test_a_model_that_fills_masks_runs_as_on_the_cpu(ask, name, tmp_path):
    from tests.stand_in import runs

    answer = ask("token_model", name, tmp_path)
    assert not answer["error"], answer["error"]
    assert answer["result"]["drift"] == 0
    assert answer["result"] == pytest.approx(runs.token_model(name, str(tmp_path)), rel=1e-3, abs=1e-6)


def test_a_model_of_uniform_tokens_runs_as_on_the_cpu(ask, tmp_path):
    from tests.stand_in import runs

    answer = ask("uniform_model", tmp_path)
    assert not answer["error"], answer["error"]
    assert answer["result"]["drift"] == 0
    assert answer["result"] == pytest.approx(runs.uniform_model(str(tmp_path)), rel=1e-3, abs=1e-6)


def test_a_whole_run(ask, tmp_path):
    """`train` with its preflight, rewards in threads, evaluations, checkpoints and the export."""
    answer = ask("whole_run", tmp_path, "rollout.solver.kind=unipc", "model.offload=true")
    assert not answer["error"], answer["error"]
    assert [line["drift"] for line in answer["result"]] == [0]


def test_mixed_devices_are_noticed(ask):
    answer = ask("planted", "mixed")
    assert "found at least two devices, cpu and cuda:0" in answer["error"]
    assert "in replay" in answer["error"]


def test_a_wait_is_noticed(ask):
    """One for each of two micro-batches."""
    planted, usual = ask("planted", "wait"), ask("phases", 4, 1, 2)
    assert planted["result"]["update"] - usual["result"]["update"] == 2


def counted(ask) -> dict[str, float]:
    """Waits of the host, from the differences between runs of different sizes."""

    def of(*sizes: int, **settings: bool) -> dict[str, int]:
        answer = ask("phases", *sizes, **settings)
        assert not answer["error"], answer["error"]
        return answer["result"]

    one, two, unipc = of(4, 1, 1), of(4, 2, 2, guard=True), of(6, 1, 1, unipc=True)
    return {
        "a rollout by Euler, of 3 deterministic steps": one["draw"],
        "a rollout by UniPC, of 5 deterministic steps": unipc["draw"],
        "one more micro-batch of a rollout": two["draw"] - one["draw"],
        "a micro-batch that is decoded": unipc["decode"] / 2,  # where the statistics are there already
        "the advantages": one["compare"],
        "one more micro-batch of an update": two["update"] - one["update"],
        "an update of one optimizer step": one["update"],
    }


def test_the_table_of_waits(ask):
    """As docs/hardware.md has it."""
    lines = (ROOT / "docs/hardware.md").read_text("utf-8").split("## Waits\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
    assert {row[0]: float(row[1]) for row in rows} == counted(ask)
