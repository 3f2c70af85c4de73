"""Two rewards for the two phases of a completion, apart (F-GRPO) or as their sum on both: held-out recall and NDCG@3.

    python benchmarks/phases.py [--seeds 0 1 2] [--noise 0 1] [--out runs/phases] [--set OVERRIDE ...]

Runs `tiny-slate` for each seed and standard deviation of the noise in the rank reward, once as it stands and once with
the sum of both rewards for each phase; all else is equal, the noise of rollouts and evaluations too. What is shown
are the rewards without noise after the last update, with paired differences and 95 % intervals over seeds and prompts.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from flashgrpo.config import RunConfig
from flashgrpo.rewards.slates import phases
from flashgrpo.run.lines import read_lines
from flashgrpo.scoring.intervals import mean_interval
from flashgrpo.train import train


def jointly(texts: list[str], prompts: list[str], noise: float = 0.0, **columns: Any) -> dict[str, list[float]]:
    """Return the sum of both rewards for each phase."""
    found = phases(texts, prompts, noise, **columns)
    both = [a + b for a, b in zip(*found.values(), strict=True)]
    return dict.fromkeys(found, both)


jointly.planted_pair = phases.planted_pair  # type: ignore[attr-defined]
CALLS = {"apart": "flashgrpo.rewards.slates:phases", "joint": f"{Path(__file__).resolve()}:jointly"}


def measured(out: Path, call: str, seed: int, noise: float, overrides: list[str]) -> np.ndarray:
    """Train one run, or read it where it is there; returns each prompt's recall and NDCG@3 without noise, (P, 2)."""
    watched = "{call: 'flashgrpo.rewards.slates:phases', watched: true, channel: {slate: slate, rank: rank}}"
    own = [f"out={out}", f"seed={seed}", f"rewards.phases.call={call}", f"rewards.phases.args.noise={noise}"]
    own += [f"rewards.clean={watched}", "tracking.preflight=skip", "tracking.progress=false"]
    config = RunConfig.load("tiny-slate", [*own, "evaluation.every=100", *overrides])
    run = train(config)
    last = read_lines(run / "evaluations.jsonl")[-1]
    values = [[sample["watched"][f"clean.{name}"] for name in ("slate", "rank")] for sample in last["samples"]]
    return np.array(values).reshape(-1, config.evaluation.samples_per_prompt, 2).mean(axis=1)


def main() -> None:
    """Print a row for each noise and reward."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--out", type=Path, default=Path("runs/phases"))
    parser.add_argument("--set", nargs="+", default=[])
    given = parser.parse_args()
    print("noise  reward  apart  joint  difference (95 % interval over seeds and prompts)")
    for noise in given.noise:
        found = {
            name: np.array(
                [measured(given.out / f"{name}-{noise:g}-{seed}", call, seed, noise, given.set) for seed in given.seeds]
            )
            for name, call in CALLS.items()
        }
        for column, name in enumerate(("recall", "NDCG@3")):
            apart, joint = (found[arm][..., column] for arm in CALLS)
            low, high = mean_interval(apart - joint) or (float("nan"),) * 2
            means = f"{apart.mean():.3f}  {joint.mean():.3f}  {(apart - joint).mean():+.3f}"
            print(f"{noise:5g}  {name:6}  {means} ({low:+.3f} to {high:+.3f})", flush=True)


if __name__ == "__main__":
    main()
