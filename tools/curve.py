"""Compare the loss curves of two commits on this machine, to the last digit: `make curve AGAINST=COMMIT`.

A change that is not meant to change numbers leaves every metric of these runs as it is. Bits depend on the CPU and on
torch, so both commits run here, the other one in a git worktree of its own. `--write FILE` stores the curves of this
commit with the machine that they come from, for `tests/end_to_end/test_curve.py`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SMALL = (
    "updates=3",
    "rollout.prompts=3",
    "rollout.group_size=4",
    "rollout.num_steps=6",
    "optim.micro_batch=4",
    "model.vae_dtype=float32",
    "evaluation.every=3",
    "evaluation.num_steps=3",
    "evaluation.samples_per_prompt=1",
    "evaluation.videos=0",
    "tracking.progress=false",
    "parallel.threads=1",
)
RUNS = {
    "bundled recipe": (),
    "flow-grpo, KL, two passes": ("algorithm=flow-grpo", "algorithm.kl_coef=0.01", "optim.passes=2"),
    "mix-grpo, GRPO-Guard": ("algorithm=mix-grpo", "algorithm.ratio.kind=normalized", "optim.minibatches=2"),
}
NOT_COMPARED = ("seconds", "samples_per_second", "peak_gib", "compute", "samples", "extremes")


def curves(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Train each of the runs with the package that is imported, and return its lines of metrics and evaluations."""
    from flashgrpo import RunConfig, train

    found = {}
    for number, (name, overrides) in enumerate(RUNS.items()):
        run = train(RunConfig.load("tiny", [f"out={folder / str(number)}", *SMALL, *overrides]))
        lines = [*_lines(run / "metrics.jsonl"), *_lines(run / "evaluations.jsonl")]
        found[name] = [{key: value for key, value in line.items() if key not in NOT_COMPARED} for line in lines]
    return found


def machine() -> dict[str, str]:
    """What the bits of a curve depend on."""
    import torch

    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = ("vendor_id", "cpu family", "model", "model name", "stepping")
    model = {
        name: line.partition(":")[2].strip()
        for line in reversed(lines)
        for name in names
        if line.split("\t")[0] == name
    }
    return {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(), **model}


def differences(ours: Any, theirs: Any, tolerance: float = 0.0, place: str = "") -> list[str]:
    """Where two curves differ: numbers by more than `tolerance`, relative to the larger (or to 1), or anything else."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return [d for key in ours for d in differences(ours[key], theirs[key], tolerance, f"{place}/{key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, tolerance, f"{place}/{i}")]
    if isinstance(ours, float) and isinstance(theirs, float) and tolerance:
        same = abs(ours - theirs) <= tolerance * max(1.0, abs(ours), abs(theirs))
    else:
        same = ours == theirs
    return [] if same else [f"{place}: {ours!r} here, {theirs!r} there"]


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def _of_commit(commit: str, folder: Path) -> Any:
    """The curves of another commit, trained from a worktree of it."""
    tree = folder / "tree"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
    try:
        output = folder / "curves.json"
        environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
        command = [sys.executable, "-m", "tools.curve", "--write", str(output)]
        subprocess.run(command, env=environment, cwd=ROOT, check=True)
        return json.loads(output.read_text("utf-8"))["curves"]
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def main() -> int:
    """Run the command line; exit code 1 where the curves differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="compare with the curves of this commit")
    parser.add_argument("--write", metavar="FILE", type=Path, help="store the curves of this commit")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours = curves(Path(folder))
        if arguments.write:
            stored = {"machine": machine(), "curves": ours}
            arguments.write.write_text(json.dumps(stored, indent=1) + "\n", "utf-8")
        if not arguments.against:
            return 0
        found = differences(json.loads(json.dumps(ours)), _of_commit(arguments.against, Path(folder)))
    print("\n".join(found[:20]) or f"every digit of {len(ours)} runs is that of {arguments.against}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
