"""What cheaper deterministic steps do to the videos' rewards and to the gradient, and what they save.

    python benchmarks/fidelity.py [RECIPE] [--updates 4] [--run DIR] [--json] NAME='key=value ...' [key=value ...]

Each NAME is a way to draw. The way without shortcuts (as in benchmarks/update.py) is measured first, and every other
one on the same prompts, steps and noise. For each are printed

- network forwards of a rollout, and seconds of rollout and decoding, relative to those without shortcuts;
- the mean difference of the rewards of the same samples, with its 95 % interval over prompt groups;
- the correlation of the rewards within groups, which is all that the update sees of them;
- the cosine between the gradients of whole updates with and without the shortcut, mean over updates with its standard
  error. Two updates of one policy on other noise have a cosine near 0 at this size (docs/log.md), so it tells how much
  of an update's direction, noise and all, the shortcut leaves as it was.

Weights are the base model's, or with --run the averaged weights of the best checkpoint of a run of the same recipe.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from update import PUBLISHED, split_ways

from flashgrpo import RunConfig
from flashgrpo.assembly import Assembly
from flashgrpo.diagnostics.gradients import Kept
from flashgrpo.distributed.world import World, process_group
from flashgrpo.models.lora import weights_replaced
from flashgrpo.run import checkpoint
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.progress import Clock
from flashgrpo.scoring.intervals import mean_interval
from flashgrpo.scoring.scoring import untimed


@dataclass(frozen=True)
class Drawn:
    """Of several updates drawn in one way: rewards (U, P, G), gradients, forwards and seconds of the rollouts."""

    rewards: np.ndarray
    gradients: Sequence[torch.Tensor]
    forwards: int
    seconds: float


def drawn(config: RunConfig, world: World, updates: int, run: Path | None) -> Drawn:
    """Draw so many updates and keep their gradients; the weights stay as they are."""
    parts, clock = Assembly(config, world), Clock()
    kept, rewards, forwards = Kept(parts.optimizer.parameters, world), [], 0
    with weights_replaced(parts.process.network, averaged(parts, run)):
        parts.draw_and_score(parts.prompt_groups(updates), untimed)  # warms up
        for update in range(updates):
            groups = parts.prompt_groups(update)
            batch = parts.draw_and_score(groups, clock)
            kept.update(parts, parts.compare(batch).record)
            rewards.append(batch.rewards.total.reshape(len(groups), -1).numpy())
            forwards += parts.process.cost(config.seed, update, 1, parts.objective.columns).rollout
    parts.rewards.close()
    seconds = clock.lap()
    return Drawn(np.stack(rewards), kept.gradients, forwards, seconds["rollout"] + seconds["decode"])


def averaged(parts: Assembly, run: Path | None) -> Mapping[str, torch.Tensor]:
    """The weights that are measured."""
    tensors = {name: parameter.detach().clone() for name, parameter in parts.optimizer.parameters.items()}
    if run is not None:
        directory, _ = RunDirectory.existing(run)
        update = directory.choose_checkpoint(None, print)
        checkpoint.read_into(directory.checkpoints, update, {"ema": tensors}, parts.world)
    return tensors


def compared(exact: Drawn, cheap: Drawn) -> dict[str, Any]:
    """One way against the exact one."""
    differences = (cheap.rewards - exact.rewards).mean(axis=2).flatten()
    a, b = (rewards - rewards.mean(axis=2, keepdims=True) for rewards in (exact.rewards, cheap.rewards))
    pairs = zip(exact.gradients, cheap.gradients, strict=True)
    cosines = [float(torch.nn.functional.cosine_similarity(p.double(), q.double(), dim=0)) for p, q in pairs]
    return {
        "forwards": round(cheap.forwards / exact.forwards, 3),
        "seconds": round(cheap.seconds / exact.seconds, 3),
        "reward_difference": float(differences.mean()),
        "interval": mean_interval(differences),
        "correlation": float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())),
        "cosine": float(np.mean(cosines)),
        "cosine_error": float(np.std(cosines, ddof=1) / len(cosines) ** 0.5) if len(cosines) > 1 else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="tiny")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("ways", nargs="+", metavar="NAME='key=value ...'")
    arguments = parser.parse_intermixed_args()
    common, ways = split_ways(arguments.ways)

    def config(changes: Sequence[str]) -> RunConfig:
        fixed = ["out=unused", f"updates={arguments.updates}", *PUBLISHED, *common]
        return RunConfig.load(arguments.recipe, [*fixed, *changes])

    exact_config = config(())
    with process_group(exact_config.parallel, exact_config.model.compute_dtype) as world:
        exact = drawn(exact_config, world, arguments.updates, arguments.run)
        results = {
            name: compared(exact, drawn(config(changes), world, arguments.updates, arguments.run))
            for name, changes in ways.items()
        }
    if arguments.json:
        print(json.dumps(results))
        return
    table = Table("way", "forwards", "seconds", "reward difference", "correlation", "cosine")
    for name, one in results.items():
        low, high = one["interval"]
        table.add_row(
            name,
            f"{one['forwards']:.2f}",
            f"{one['seconds']:.2f}",
            f"{one['reward_difference']:+.3f} ({low:+.3f} to {high:+.3f})",
            f"{one['correlation']:.2f}",
            f"{one['cosine']:.2f} ± {one['cosine_error'] or 0:.2f}",
        )
    console = Console(width=120)
    console.print(table)
    spread = exact.rewards.std(axis=2).mean()
    console.print(f"without shortcuts: reward {exact.rewards.mean():.3f}, std within a group {spread:.3f}")


if __name__ == "__main__":
    main()
