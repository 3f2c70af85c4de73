"""Seconds of one update of the bundled run, by phase: `python benchmarks/update.py [--updates 7] [--json] [key=value]`.

Trains a few updates of `recipes/tiny.yaml` (64 videos each) in a temporary folder, without evaluations or checkpoints,
and prints the median of each phase over all updates but the first, which warms up.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from flashgrpo import RunConfig, scoring, train
from flashgrpo.models.wan import WanModel
from flashgrpo.run_directory import read_lines
from flashgrpo.train import Run


class Watch:
    """Seconds spent in the models and the rewards; the rest of an update is the loop's own."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.at_update: list[float] = []
        for owner, name in (
            (WanModel, "forward"),
            (WanModel, "encode"),
            (WanModel, "decode"),
            (torch.Tensor, "backward"),
            (scoring, "_call"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name)))
        log = Run.log

        def noted(run: Run, *arguments: object) -> None:
            self.at_update.append(self.spent)
            log(run, *arguments)

        Run.log = noted  # type: ignore[method-assign,assignment]

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.spent += time.perf_counter() - started

        return call


def measure(updates: int, overrides: list[str]) -> dict[str, object]:
    """Median seconds by phase, the loop's own share of an update, and what they were measured on."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        quiet = [
            "tracking.progress=false",
            "tracking.preflight=skip",
            "evaluation.every=1000000",
            "checkpoint.every=1000000",
        ]
        config = RunConfig.load("tiny", [f"out={folder}/run", f"updates={updates + 1}", *quiet, *overrides])
        lines = read_lines(train(config) / "metrics.jsonl")[1:]
    phases = {name: statistics.median(line["seconds"].get(name, 0.0) for line in lines) for name in lines[0]["seconds"]}
    names = ("rollout", "decode", "reward", "update", "evaluate", "checkpoint")
    outside = [1 - sum(line["seconds"].get(name, 0.0) for name in names) / line["seconds"]["total"] for line in lines]
    inside = [after - before for before, after in itertools.pairwise(watch.at_update)]
    own = [1 - spent / line["seconds"]["total"] for spent, line in zip(inside, lines, strict=True)]
    return {
        "updates": len(lines),
        "videos": lines[0]["samples"],
        "threads": torch.get_num_threads(),
        "seconds": {name: round(value, 3) for name, value in phases.items() if value},
        "outside_phases": round(statistics.median(outside), 4),
        "outside_models": round(statistics.median(own), 4),
        "slowest": max(line["seconds"]["total"] for line in lines),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    result = measure(arguments.updates, arguments.overrides)
    if arguments.json:
        print(json.dumps(result))
        return
    table = Table("phase", "seconds", title=f"one update of {result['videos']} videos, {result['threads']} threads")
    for name, seconds in result["seconds"].items():
        table.add_row(name, f"{seconds:.2f}")
    Console().print(table)
    print(f"the loop itself, outside of models and rewards: {result['outside_models']:.1%}")


if __name__ == "__main__":
    main()
