"""Seconds of one update by phase, and how much faster a recipe is than the same without shortcuts.

    python benchmarks/update.py [RECIPE] [--updates 7] [--json] [key=value ...]

Updates of the recipe as it is, and of the published way to compute them (Euler at every step, guidance at every step,
the trained step replayed, an autoencoder in float32), are measured in turn, on the same prompts and in one process.
Printed are the medians over all updates but the first of each, which warms up, and the median ratio of the pairs.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from flashgrpo import RunConfig
from flashgrpo.assembly import Assembly
from flashgrpo.distributed import memory
from flashgrpo.distributed.world import process_group
from flashgrpo.models.pipeline import PipelineModel
from flashgrpo.run.progress import Clock
from flashgrpo.train import one_update

PUBLISHED = (
    "rollout.solver={kind: euler}",
    "rollout.deterministic_steps=null",
    "rollout.guidance_interval=[0,1]",
    "rollout.deterministic_dtype=null",
    "rollout.reuse=null",
    "rollout.retain=false",
    "model.compile=false",
    "model.vae_dtype=float32",
)
PHASES = ("rollout", "decode", "reward", "update")


class Watch:
    """Seconds spent in calls of the model and in backward passes (meaningful where nothing is computed later)."""

    def __init__(self) -> None:
        self.spent = 0.0
        for owner, name in (
            (PipelineModel, "velocity"),
            (PipelineModel, "encode"),
            (PipelineModel, "decode"),
            (torch.Tensor, "backward"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.spent += time.perf_counter() - started

        return call


def measure(recipe: str, updates: int, overrides: list[str]) -> dict[str, Any]:
    """Medians by phase of both ways, their ratio, and what they were measured on."""
    watch, configs = Watch(), {}
    for name, changes in (("published", PUBLISHED), ("recipe", ())):
        configs[name] = RunConfig.load(recipe, ["out=unused", f"updates={updates + 1}", *overrides, *changes])
    shared = configs["recipe"]
    with process_group(shared.parallel, shared.model.compute_dtype) as world:
        ways = {name: Assembly(config, world) for name, config in configs.items()}
        lines: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for update in range(updates + 1):
            for name, parts in ways.items():
                groups = parts.prompt_groups(update)
                memory.peak(world.device, reset=True)
                clock, spent = Clock(), watch.spent
                one_update(parts, groups, clock)
                seconds = clock.lap()
                seconds["models"] = watch.spent - spent + seconds.get("reward", 0.0)
                seconds["peak"] = memory.peak(world.device)
                lines[name].append(seconds)
        for parts in ways.values():
            parts.rewards.close()
        pairs = zip(lines["published"][1:], lines["recipe"][1:], strict=True)
        ratios = [slow["total"] / fast["total"] for slow, fast in pairs]
        samples = shared.rollout.prompts * shared.rollout.group_size
        return {
            "speedup": round(statistics.median(ratios), 3),
            "speedup_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "updates": updates,
            "videos": samples,
            "device": world.device_name,
            "threads": torch.get_num_threads(),
            **{name: summary(lines[name][1:], samples, ways[name]) for name in ways},
        }


def summary(lines: list[dict[str, float]], samples: int, parts: Assembly) -> dict[str, Any]:
    """Of the updates of one way."""
    seconds = {phase: statistics.median(line.get(phase, 0.0) for line in lines) for phase in (*PHASES, "total")}
    outside = [1 - math.fsum(line.get(phase, 0.0) for phase in PHASES) / line["total"] for line in lines]
    config, columns = parts.config, parts.objective.columns
    return {
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "slowest": round(max(line["total"] for line in lines), 3),
        "videos_per_hour": round(3600 * samples / seconds["total"], 1),
        "forwards": parts.process.cost(config.seed, 0, config.optim.passes, columns).total,
        "peak_gib": round(max(line["peak"] for line in lines) / 2**30, 2),
        "graphs_kept": parts.process.source.keeps_graphs,
        "outside_phases": round(statistics.median(outside), 4),
        "outside_models": round(statistics.median(1 - line["models"] / line["total"] for line in lines), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="tiny")
    parser.add_argument("--updates", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    recipe, overrides = arguments.recipe, arguments.overrides
    if "=" in recipe and not Path(recipe).exists():
        recipe, overrides = "tiny", [recipe, *overrides]
    result = measure(recipe, arguments.updates, overrides)
    if arguments.json:
        print(json.dumps(result))
        return
    table = Table("", "published", "recipe", title=f"one update of {result['videos']} videos, {result['device']}")
    both = [result["published"], result["recipe"]]
    for phase in (*PHASES, "total"):
        table.add_row(f"{phase}, s", *(f"{way['seconds'][phase]:.2f}" for way in both))
    for key in ("videos_per_hour", "forwards", "peak_gib", "graphs_kept"):
        table.add_row(key.replace("_", " "), *(str(way[key]) for way in both))
    for key in ("outside_phases", "outside_models"):
        table.add_row(key.replace("_", " "), *(f"{way[key]:.1%}" for way in both))
    Console().print(table)
    low, high = result["speedup_range"]
    print(f"speedup {result['speedup']:.2f} (pairs {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
