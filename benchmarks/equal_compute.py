"""Nine methods on the bundled model at equal compute: the evidence of docs/results.md, which goes on where it was left.

    python benchmarks/equal_compute.py search     learning rates: three for each method, seed 100, half the budget
    python benchmarks/equal_compute.py runs       published ways at equal compute, cheap ways at as many updates
    python benchmarks/equal_compute.py race       cheap ways, evaluated at every second update: who is first at a level
    python benchmarks/equal_compute.py steps      one, two and four optimizer steps for a rollout, clipped and masked
    python benchmarks/equal_compute.py seconds    seconds of an update of each way, measured in turn
    python benchmarks/equal_compute.py tables     the tables, from what there is

`--methods awm,v-grpo` runs these, `--jobs 2` two at a time. benchmarks/equal_compute/STAGE/METHOD is the folder of a
`flashgrpo compare`: plan.json and the seed-S.json of runs that have ended are kept in the repository, and a later day
goes on from them. The tables are made from these alone.
"""

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashgrpo.assembly import Assembly
from flashgrpo.compare import compare
from flashgrpo.compare.folder import ComparisonFolder
from flashgrpo.compare.plan import Plan, make_plan
from flashgrpo.compare.record import read_run
from flashgrpo.compare.statistics import curve, first_reached
from flashgrpo.distributed.world import process_group
from flashgrpo.files import read_object, write_json
from flashgrpo.run.progress import Clock
from flashgrpo.scoring.intervals import mean_interval
from flashgrpo.train import one_update

HOME = Path(__file__).with_suffix("")
BUDGET = 106_000  # network forwards of a published run: 36 updates of Flash-GRPO
LEVEL = 0.686  # the held-out reward that Flow-GRPO came to on 2026-11-24
FLOW_GRPO = {"forwards": 98_300, "per update": 9_856}  # what it spent until then
SEEDS, SEARCH_SEED = 3, 100
SEARCHED = ("3e-3", "6e-3", "1e-2")
SOUND = -0.02  # a cheap way is sound where the interval of its difference to the published way ends above

# The published way to compute an update; an average of ten steps' weights would mostly show the base model.
PROBLEM = (
    "rollout.num_steps=20",
    "rollout.solver={kind: euler}",
    "rollout.deterministic_steps=null",
    "rollout.guidance_interval=[0,1]",
    "model.vae_dtype=float32",
    "optim.ema.decay=0",
    "parallel.threads=1",
)
TWO_STEPS = ("optim.minibatches=2",)
CPS = ("algorithm.explore.noise={kind: cps, eta: 0.7}",)
SHORT_WALK = ("rollout.solver={kind: unipc}", "rollout.deterministic_steps=4", "rollout.guidance_interval=[0,0]")


def free(steps: int, *more: str) -> tuple[str, ...]:
    """Return a rollout without guidance."""
    return (f"rollout.num_steps={steps}", "rollout.guidance_scale=1", *more)


def dpm(steps: int, *more: str) -> tuple[str, ...]:
    """Return a rollout without guidance and without noise, of second order."""
    return free(steps, "rollout.solver={kind: dpm}", *more)


FEW_LEVELS = ("algorithm.score.times=2", "algorithm.score.draw=stratified")
NO_PENALTY = (
    "algorithm.objective.kl_coef=0",
    "algorithm.objective.average_coef=0",
    "algorithm.behaviour={kind: current}",
)


@dataclass(frozen=True)
class Method:
    """A preset with its learning rate, and two ways to run it.

    Args:
        rate: the best of the search, by the training reward of the last five updates.
        published: changes of the problem that its publication has.
        cheap: changes that spare forwards, in place of `published`.
        lean: the same with more levels, where the cheap way falls behind the published one at as many updates.
        steady: the next lower rate, where the runs of `race` rose and then fell at the rate of the search.
    """

    preset: str
    rate: str
    published: tuple[str, ...]
    cheap: tuple[str, ...]
    lean: tuple[str, ...] = ()
    steady: str = ""

    @property
    def long_rate(self) -> str:
        """The rate of runs that are longer than those of the search."""
        return self.steady or self.rate


METHODS = {
    "flash-grpo": Method("flash-grpo", "1e-2", CPS, (*CPS, *SHORT_WALK), steady="6e-3"),
    "flow-grpo": Method("flow-grpo", "1e-2", (*CPS, *TWO_STEPS), (*CPS, *TWO_STEPS, *free(8))),
    "flow-grpo-fast": Method("flow-grpo-fast", "6e-3", CPS, (*CPS, *SHORT_WALK)),
    "mix-grpo": Method("mix-grpo", "1e-2", CPS, (*CPS, *SHORT_WALK), steady="6e-3"),
    "dance-grpo": Method("dance-grpo", "1e-2", (*CPS, *TWO_STEPS), (*CPS, *TWO_STEPS, *free(8))),
    "flow-dppo": Method("flow-dppo", "6e-3", (*CPS, *TWO_STEPS, "rollout.num_steps=10"), (*CPS, *TWO_STEPS, *free(6))),
    "awm": Method(
        "awm",
        "1e-2",
        dpm(14),
        dpm(4, *FEW_LEVELS),
        lean=dpm(4, "algorithm.score.times=4", "algorithm.score.draw=stratified"),
    ),
    "v-grpo": Method(
        "v-grpo", "6e-3", dpm(10), dpm(4, "algorithm.score.times=1"), lean=dpm(4, "algorithm.score.times=3")
    ),
    "diffusion-nft": Method("diffusion-nft", "1e-2", dpm(10), dpm(4, *FEW_LEVELS)),
}


@dataclass(frozen=True)
class Stage:
    """A comparison of ways of one method: name -> changes of the problem."""

    ways: Mapping[str, tuple[str, ...]]
    seed: int = 0
    seeds: int = SEEDS
    budget: int = BUDGET
    points: int = 3

    def arguments(self, method: Method) -> tuple[list[str], list[str]]:
        """Return overrides and algorithms of `flashgrpo compare`."""
        changes = [f"{way}:{change}" for way, changes in self.ways.items() for change in changes]
        return [*PROBLEM, f"seed={self.seed}", *changes], [f"{way}={{preset: {method.preset}}}" for way in self.ways]

    def plan(self, method: Method) -> Plan:
        """Settle what it runs."""
        overrides, algorithms = self.arguments(method)
        return make_plan("tiny", overrides, algorithms, self.seeds, self.budget, self.points, "")


# ---- the stages ------------------------------------------------------------------------------------------------------


def search(method: Method) -> Stage:
    """Try three learning rates on a seed that no other stage has; what counts is the reward that is trained on."""
    ways = {rate: (*method.published, f"optim.lr={rate}") for rate in SEARCHED}
    return Stage(ways, seed=SEARCH_SEED, seeds=1, budget=BUDGET // 2)


def runs(method: Method) -> Stage:
    """Spend the budget in the published way; cheaper ways have as many updates."""
    published = Stage({"published": (*method.published, f"optim.lr={method.long_rate}")})
    updates = published.plan(method).algorithms["published"].updates
    shorter = {"cheap": method.cheap} | ({"lean": method.lean} if method.lean else {})
    rate = f"optim.lr={method.long_rate}"
    ways = {way: (*changes, rate, f"updates={updates}") for way, changes in shorter.items()}
    return Stage({**published.ways, **ways})


def race(method: Method) -> Stage:
    """Evaluate the cheap way at every second of 20 updates."""
    ways = {"cheap": (*method.cheap, f"optim.lr={method.rate}", "updates=20")}
    if method.preset == "flow-grpo":  # the shortcuts that the others have, guidance kept where a step is trained
        short = (*CPS, *TWO_STEPS, *SHORT_WALK, "rollout.num_steps=8")
        ways["short"] = (*short, f"optim.lr={method.rate}", "updates=20")
    if method.steady:
        ways["slower"] = (*method.cheap, f"optim.lr={method.steady}", "updates=20")
    if method.preset == "awm":
        ways["bare"] = (*method.cheap, *NO_PENALTY, f"optim.lr={method.rate}", "updates=20")
    return Stage(ways, points=10)


def steps(method: Method) -> Stage:
    """Serve one, two and four optimizer steps with each rollout of all steps, clipped or masked by divergence."""
    shared = (*CPS, *free(6), f"optim.lr={method.rate}", "updates=30")
    objectives = {"masked": (), "clipped": ("algorithm.objective={kind: clipped}",)}
    return Stage(
        {
            f"{kind}-{passes}": (*shared, f"optim.passes={passes}", *changes)
            for passes in (1, 2, 4)
            for kind, changes in objectives.items()
        }
    )


STAGES = {"search": search, "runs": runs, "race": race, "steps": steps}


def run(stage: str, name: str, jobs: int) -> None:
    """Go on with the comparison of a stage of a method."""
    chosen = STAGES[stage](METHODS[name])
    overrides, algorithms = chosen.arguments(METHODS[name])
    compare(
        "tiny",
        overrides,
        algorithms,
        seeds=chosen.seeds,
        out=HOME / stage / name,
        budget=chosen.budget,
        points=chosen.points,
        jobs=jobs,
    )


def seconds(names: Sequence[str], updates: int = 3) -> None:
    """Measure the seconds of an update of every way in turn, with nothing beside it; medians so far after each turn."""
    configs = {
        f"{name} {way}": config
        for name in names
        for stage in (race, runs)
        for way, config in stage(METHODS[name]).plan(METHODS[name]).algorithms.items()
    }
    first = next(iter(configs.values()))
    with process_group(first.parallel, first.model.compute_dtype) as world:
        ways = {name: Assembly(config, world) for name, config in configs.items()}
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for update in range(updates + 1):
            for name, parts in ways.items():
                groups, clock = parts.prompt_groups(update), Clock()
                one_update(parts, groups, clock)
                spent[name].append(clock.lap()["total"])
            if update:  # the first one warms up
                medians = {name: round(statistics.median(values[1:]), 3) for name, values in spent.items()}
                found = {"device": world.device_name, "updates": update, "seconds": medians}
                write_json(HOME / "seconds.json", found, indent=1)
        for parts in ways.values():
            parts.rewards.close()


# ---- the tables ------------------------------------------------------------------------------------------------------


def ended(stage: str, name: str) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of a stage of a method that have ended, by way and in the order of their seeds."""
    folder = ComparisonFolder(HOME / stage / name)
    if not folder.plan_file.exists():
        return {}
    plan = folder.plan()
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in plan["algorithms"]}
    for files in folder.runs(plan):
        if files.record.exists():
            found[files.algorithm].append(read_run(files, plan["algorithms"][files.algorithm]))
    return {way: runs for way, runs in found.items() if runs}


def paired(runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> tuple[float, Any]:
    """Return the mean difference of the final held-out rewards and its interval, paired by seed and prompt."""
    by_seed = {run["seed"]: run["points"][-1]["prompts"] for run in others}
    rows = [np.subtract(run["points"][-1]["prompts"], by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]
    return float(np.mean(rows)), mean_interval([row.tolist() for row in rows])


def of_level(runs: Sequence[Mapping[str, Any]], level: float) -> float | None:
    """Return the forwards at which the mean over the seeds first comes to a held-out reward."""
    x, rewards = curve(runs, "compute")
    return first_reached(x, rewards.mean(axis=0), level)


def text(value: float, interval: Any) -> str:
    """Write a difference with its interval."""
    return f"{value:+.3f} ({interval[0]:+.3f} to {interval[1]:+.3f})" if interval else f"{value:+.3f}"


def count(value: float | None) -> str:
    """Write forwards with three digits."""
    return "never" if value is None else f"{float(f'{value:.3g}'):,.0f}"


def summary(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the cells that every table of runs has: seeds, updates, forwards, final reward, difference, watched."""
    last = [run["points"][-1] for run in runs]
    differences = [point["prompts"] for point in last]
    watched = [np.mean([p["watched"][key] - p["base_watched"][key] for p in last]) for key in last[0]["watched"]]
    return [
        str(len(runs)),
        str(last[0]["update"]),
        count(last[0]["compute"]),
        f"{np.mean([point['reward'] for point in last]):.3f}",
        text(float(np.mean(differences)), mean_interval(differences)),
        " / ".join(f"{value:+.3f}" for value in watched),
    ]


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    print(f"\n## {title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


RUN = ("seeds", "updates", "forwards", "held-out", "above base", "watched")


def tables() -> None:
    """Print every table from the records."""
    found = {stage: {name: ended(stage, name) for name in METHODS} for stage in STAGES}
    rows = []
    for name, ways in found["search"].items():
        late = {way: np.mean([line["reward"] for line in runs[0]["updates"][-5:]]) for way, runs in ways.items()}
        rows.append(
            [f"`{name}`", *(f"{late[rate]:.3f}" if rate in late else "" for rate in SEARCHED), METHODS[name].rate]
        )
    print_table("Training reward of the last five updates, by learning rate", ("method", *SEARCHED, "taken"), rows)
    rows = []
    for name, ways in found["runs"].items():
        for way, runs in ways.items():
            cells = summary(runs)
            against = text(*paired(runs, ways["published"])) if way != "published" and "published" in ways else ""
            rows.append([f"`{name}`, {way}", *cells, against, count(of_level(runs, LEVEL))])
    print_table("Published and cheap ways", ("way", *RUN, "above published", f"to {LEVEL}"), rows)
    measured = HOME / "seconds.json"
    each = read_object(measured)["seconds"] if measured.exists() else {}
    whole = each.get("flow-grpo published", 0) * FLOW_GRPO["forwards"] / FLOW_GRPO["per update"]
    rows = []
    for name, ways in found["race"].items():
        for way, runs in ways.items():
            forwards, spent = of_level(runs, LEVEL), each.get(f"{name} {way}")
            last = runs[0]["points"][-1]
            time = forwards * last["update"] / last["compute"] * spent if forwards and spent else 0.0
            shares = [f"{forwards / FLOW_GRPO['forwards']:.1%}" if forwards else ""]
            shares += [f"{time:.0f}", f"{time / whole:.1%}"] if time and whole else ["", ""]
            rows.append([f"`{name}`, {way}", *summary(runs), count(forwards), *shares])
    header = ("way", *RUN, f"to {LEVEL}", "of Flow-GRPO's", "seconds", "of Flow-GRPO's")
    print_table(f"Who comes to {LEVEL} first", header, rows)
    rows = [[way, *summary(runs)] for way, runs in found["steps"]["flow-dppo"].items()]
    print_table("Several optimizer steps for a rollout", ("objective-steps", *RUN), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "seconds", "tables"])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    names = arguments.methods.split(",")
    if arguments.stage == "tables":
        tables()
    elif arguments.stage == "seconds":
        seconds(names)
    else:
        for name in names:
            run(arguments.stage, name, arguments.jobs)


if __name__ == "__main__":
    main()
