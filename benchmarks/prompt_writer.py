"""What a trained prompt writer is worth beside captions that nobody learnt: held-out wishes, on the same noise.

    python benchmarks/prompt_writer.py RUN [RUN ...]

The runs are whole ones of `tiny-prompt-writer`, with other seeds and one evaluation seed. Their writers' rewards are
those of confirmation.json, on noise that selected nothing; the captions are drawn from that noise, too. The last is no
rival: it reads the columns that the reward reads. Differences are paired, with 95 % intervals over runs and prompts.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from flashgrpo.assembly import make_evaluator, make_process
from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import single_process, use_threads
from flashgrpo.processes.programs.examples import fixed_template, wish_itself
from flashgrpo.processes.programs.process import ProgramProcess
from flashgrpo.prompts import read_prompts
from flashgrpo.rewards.shapes import ATTRIBUTES
from flashgrpo.scoring.heldout import evaluation_record
from flashgrpo.scoring.intervals import mean_interval
from flashgrpo.scoring.rewards import Rewards

GAPS = {"color": "red", "shape": "circle", "direction": "left", "speed": "slowly"}


def all_that_was_wished(prompt: str, call: Any, **columns: Any) -> str:
    """Write the caption of a reader who makes no mistake, with fixed words where a wish says nothing."""
    color, shape, direction, speed = (columns.get(name) or GAPS[name] for name in ATTRIBUTES)
    return f"a {color} {shape} moving {direction} {speed}"


def of_prompts(record: dict[str, Any], key: str, each: int) -> np.ndarray:
    """Return the mean of each prompt's samples, (P,)."""
    return np.array([sample[key] for sample in record["samples"]]).reshape(-1, each).mean(axis=1)


def main() -> None:
    """Print a row for each caption."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    given = parser.parse_args()
    config = RunConfig.load(given.runs[0] / "config.yaml")
    use_threads(config.parallel.threads)
    records = [json.loads((run / "confirmation.json").read_text("utf-8")) for run in given.runs]
    each = config.evaluation.samples_per_prompt
    tuned, base = (np.array([of_prompts(record, key, each) for record in records]) for key in ("reward", "base_reward"))
    world, prompts = single_process(), read_prompts(config.prompts.heldout, "prompts.heldout")
    process, rewards = make_process(config, world, prompts), Rewards(config.rewards, config.model.fps)
    assert isinstance(process, ProgramProcess)
    rewards.load(world)
    print("caption | reward | the trained writer's less it")
    rows = [("the trained writer", tuned), ("the base writer", base)]
    for program in (wish_itself, fixed_template, all_that_was_wished):
        process.program = program
        evaluation = make_evaluator(config, process, prompts, rewards, world, 0)(fresh=True)
        rows.append((program.__name__, of_prompts(evaluation_record(0, evaluation, None, each), "reward", each)[None]))
    for name, values in rows:
        low, high = mean_interval(tuned - values) or (float("nan"),) * 2
        print(f"{name} | {values.mean():.3f} | {(tuned - values).mean():+.3f} ({low:+.3f} to {high:+.3f})", flush=True)
    rewards.close()


if __name__ == "__main__":
    main()
