"""How the cost of an update grows: `python benchmarks/scaling.py [--updates 3] [--json]`.

Seconds of one update of the bundled model against the number of groups, the group size, frames, resolution (pixels)
and steps, with the exponent of the fitted power law (1 is linear), and one process against two. Steps are measured
twice: as the recipe takes them, and with every one of them computed. One thread a process; the points of a sweep are
measured in turn, round after round, and the medians are printed.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from flashgrpo.run.directory import read_lines

BASE = {"rollout.prompts": 2, "rollout.group_size": 8, "model.num_frames": 9, "rollout.num_steps": 20}
SWEEPS: dict[str, tuple[Sequence[int], Callable[[int], dict[str, object]]]] = {
    "groups": ((2, 4, 8, 16), lambda n: {"rollout.prompts": n}),
    "group size": ((4, 8, 16, 32), lambda n: {"rollout.group_size": n}),
    "latent frames": ((2, 3, 5, 9), lambda n: {"model.num_frames": 4 * n - 3}),
    "pixels": ((32**2, 48**2, 64**2, 96**2), lambda n: {"model.height": math.isqrt(n), "model.width": math.isqrt(n)}),
    "steps": ((5, 10, 20, 40), lambda n: {"rollout.num_steps": n}),
    "steps, all computed": (
        (5, 10, 20, 40),
        lambda n: {"rollout.num_steps": n, "rollout.deterministic_steps": "null"},
    ),
}
QUIET = ["tracking.progress=false", "tracking.preflight=skip", "evaluation.every=100000", "checkpoint.every=100000"]
QUIET += ["parallel.threads=1", "evaluation.videos=0", "evaluation.samples_per_prompt=1", "evaluation.num_steps=2"]


def seconds_per_update(updates: int, settings: Mapping[str, object], processes: int = 1) -> float:
    """Median over the updates of a short run in processes of its own; its first update, which warms up, is left out."""
    with tempfile.TemporaryDirectory() as folder:
        changes = [f"{key}={value}" for key, value in {**BASE, **settings}.items()]
        command = [sys.executable, "-m", "flashgrpo"]
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            command = [sys.executable, *launcher, "-m", "flashgrpo"]
        command += ["train", "tiny", f"out={folder}/run", f"updates={updates + 1}", *QUIET, *changes]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        lines = read_lines(Path(folder) / "run/metrics.jsonl")[1:]
    return statistics.median(line["seconds"]["total"] for line in lines)


def sweep(name: str, updates: int, rounds: int) -> dict[str, object]:
    """Seconds at each value of a setting, and the exponent that fits them."""
    values, settings = SWEEPS[name]
    samples: dict[int, list[float]] = {value: [] for value in values}
    for _ in range(rounds):
        for value, seconds in samples.items():
            seconds.append(seconds_per_update(updates, settings(value)))
    medians = {value: statistics.median(seconds) for value, seconds in samples.items()}
    exponent = np.polyfit(np.log(list(medians)), np.log(list(medians.values())), 1)[0]
    return {"seconds": medians, "exponent": round(float(exponent), 2)}


def processes(updates: int, rounds: int) -> dict[str, object]:
    """One process against two, a thread each, on the bundled run's 64 videos, measured alternately."""
    samples: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for count, seconds in samples.items():
            seconds.append(seconds_per_update(updates, {"rollout.prompts": 8}, count))
    ratios = [one / two for one, two in zip(*samples.values(), strict=True)]
    return {
        "seconds": {count: statistics.median(seconds) for count, seconds in samples.items()},
        "speedup": round(statistics.median(ratios), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=3, help="updates in a measurement")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each point")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args()
    results = {key: sweep(key, arguments.updates, arguments.rounds) for key in SWEEPS}
    results["processes"] = processes(arguments.updates, max(arguments.rounds, 3))
    if arguments.json:
        print(json.dumps(results))
        return
    table = Table("setting", "seconds of an update", "exponent")
    for key, result in results.items():
        seconds = ", ".join(f"{value}: {spent:.2f}" for value, spent in result["seconds"].items())
        exponent = result.get("exponent", math.nan)
        table.add_row(key, seconds, f"{exponent:.2f}" if key in SWEEPS else f"{result['speedup']} times faster")
    Console().print(table)


if __name__ == "__main__":
    main()
