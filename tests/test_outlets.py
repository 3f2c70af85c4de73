"""Standard output and error that are full, closed, or that nobody reads."""

import os
import subprocess
import sys

import pytest

from flashgrpo.outlets import Outlet, outlets
from tests.bad_inputs.test_filesystem import RUNS
from tests.conftest import small_run

COMMAND = f"{sys.executable} -m flashgrpo"


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of the shell whose exit code is the command's, and not that of a reader."""
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("config tiny > /dev/full", 2, "the result cannot be written to standard output: no space left on device"),
        ("schema | head -c 1", 0, ""),
        ("config tiny >&- 2>&-", 0, ""),
        ("config nothing 2> /dev/full <&-", 2, ""),
    ],
)
def test_commands(line, code, said):
    done = shell(f"{COMMAND} {line}")
    assert done.returncode == code
    assert said in done.stderr


@pytest.mark.parametrize("where", ["> /dev/full 2> /dev/full", ">&- 2>&- <&-", "2>&1 | head -c 1"])
def test_a_run_outlives_who_looks_at_it(tmp_path, where):
    """A reader that dies is met in the middle of the run, where it says that the base model has been scored."""
    recipe = tmp_path / "recipe.yaml"
    settings = [one for one in RUNS["flow"] if not one.startswith("updates")]
    config = small_run(tmp_path / "run", *settings, "updates=2", "tracking.progress=true")
    recipe.write_text(config.to_yaml(), "utf-8")
    assert shell(f"{COMMAND} train {recipe} {where}").returncode == 0
    assert (tmp_path / "run/checkpoints/000002/state.json").exists()


def test_what_was_written_before_and_elsewhere_stays():
    """After an error nothing reaches the descriptor; a reader that cannot keep up loses a piece only."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(writer, "w") as stream:
        outlet = Outlet(stream)
        for _ in range(40):
            outlet.write("a" * 4096)
            outlet.flush()
        assert isinstance(outlet.lost, BlockingIOError)
        os.read(reader, 1 << 20)
        outlet.write("later")
        outlet.flush()
        assert os.read(reader, 1 << 20).endswith(b"later")
        os.close(reader)
        outlet.write("nobody reads")
        outlet.flush()
        assert os.path.samestat(os.fstat(writer), os.stat(os.devnull))
        assert outlet.encoding == stream.encoding


def test_streams_come_back():
    before = sys.stdout, sys.stderr
    with outlets():
        assert isinstance(sys.stdout, Outlet)
        print("passed on")
    assert (sys.stdout, sys.stderr) == before
