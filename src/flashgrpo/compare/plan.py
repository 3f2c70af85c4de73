"""What a comparison runs: the settings of each algorithm on one problem, and the updates that the budget buys it."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from flashgrpo.config import RunConfig, read_override
from flashgrpo.config.algorithm import GROUPING, SHORT, read_tree
from flashgrpo.config.recipe import merge_choices, parse_override
from flashgrpo.errors import UserError, suggest
from flashgrpo.kinds import kind_of
from flashgrpo.presets import PRESETS, Algorithm

OWN = (
    "algorithm",
    "rollout",
    "optim",
    "updates",
    "model.train",
    "model.gradient_checkpointing",
)  # may differ by algorithm
OF_THE_PLAN = {"out": "--out", "evaluation.every": "--points"}  # settings that an option decides
NOT_COMPARED = ("out", "seed", "updates", "checkpoint", "parallel", "tracking")  # may change from start to start
MOST_UPDATES = 100_000
FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """A comparison before it runs.

    Args:
        budget: network forwards of each run, as `processes/flow/cost.py` counts them.
        algorithms: name -> settings of its runs but for `seed` and `out`; the others are held against the first.
    """

    recipe: str
    budget: int
    seeds: Sequence[int]
    algorithms: Mapping[str, RunConfig]

    def as_json(self) -> dict[str, Any]:
        """Return plan.json: what a later start may not change."""
        return {
            "format": FORMAT,
            "recipe": self.recipe,
            "budget": self.budget,
            "seeds": list(self.seeds),
            "algorithms": {
                name: {
                    "updates": config.updates,
                    "compute_per_update": asdict(kind_of(config).planned_cost(config, 0)),
                    "settings": config.model_dump(mode="json", exclude=set(NOT_COMPARED)),
                }
                for name, config in self.algorithms.items()
            },
        }


def settings_today(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the settings of a stored plan as this version writes them; what has come since has its default.

    Raises:
        UserError: one has gone, and had a value that is not the only one left; it names `source`.
    """
    config = RunConfig.parse({"out": ".", "updates": 1, **settings}, source)
    return config.model_dump(mode="json", exclude=set(NOT_COMPARED))


def make_plan(
    recipe: str,
    overrides: Sequence[str],
    algorithms: str | Sequence[str],
    seeds: int,
    budget: int | None,
    points: int,
    keep: str | Sequence[str],
) -> Plan:
    """Settle everything before the first process starts; the arguments are those of `compare`.

    Raises:
        UserError: an unknown or doubled algorithm, a setting that has no place here, or a budget below one update.
    """
    specs = read_algorithms(algorithms)
    if seeds < 1:
        raise UserError(f"--seeds: a comparison needs at least 1 seed, not {seeds}")
    if points < 1:
        raise UserError(f"--points: a run is evaluated at least once, not {points} times")
    problem, shared, own = _sorted_overrides(overrides, list(specs))
    base = RunConfig.load(recipe, problem).with_absolute_paths()
    kept = _kept(base.algorithm, keep.split(",") if isinstance(keep, str) else keep)
    configs = {
        name: _settings(base, spec, [*kept, *shared, *own.get(name, [])], f"{recipe}, {name}")
        for name, spec in specs.items()
    }
    lengths = {name: configs[name].updates for name, changes in own.items() if any("updates" in c for c in changes)}
    first = next(iter(configs.values()))
    source = f"--budget: {budget:,} forwards" if budget is not None else ""
    if budget is None:
        budget = sum(kind_of(first).planned_cost(first, update).total for update in range(base.updates))
        source = f"updates: the {base.updates:,} updates of {next(iter(configs))}, {budget:,} forwards,"
    whole = {
        name: _at_its_length(
            config, f"{recipe}, {name}", lengths.get(name) or _updates_within(config, budget, name, source), points
        )
        for name, config in configs.items()
    }
    return Plan(recipe, budget, range(base.seed, base.seed + seeds), whole)


def read_algorithms(algorithms: str | Sequence[str]) -> dict[str, Any]:
    """`flash-grpo,mine={preset: flow-grpo, kl_coef: 0.1}` -> name -> what a recipe's `algorithm` may be.

    Raises:
        UserError: no name, a doubled one, an unknown preset, or a value that is no YAML.
    """
    specs: dict[str, Any] = {}
    for text in _split(algorithms) if isinstance(algorithms, str) else algorithms:
        name, equals, _ = text.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name == "figures":
            raise UserError(
                f"--algorithms: {name!r} cannot name a folder of runs; give a preset, or NAME={{preset: ..., ...}} "
                "with letters, digits, - and _ in NAME"
            )
        if name in specs:
            raise UserError(
                f"--algorithms: {name} comes twice; name one otherwise, for instance {name}-2={{preset: {name}}}"
            )
        spec = parse_override(text)[name] if equals else name
        preset = spec.get("preset", "flash-grpo") if isinstance(spec, Mapping) else str(spec)
        if preset not in PRESETS:
            raise UserError(f"--algorithms: no preset is called {preset!r}; {suggest(str(preset), PRESETS)}")
        specs[name] = spec
    if not specs:
        raise UserError(f"--algorithms: name at least one of {', '.join(PRESETS)}")
    return specs


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _sorted_overrides(
    overrides: Sequence[str], names: Sequence[str]
) -> tuple[list[str], list[dict[Any, Any]], dict[str, list[dict[Any, Any]]]]:
    """Overrides of the problem, changes of every algorithm's `algorithm`, and changes of one algorithm's settings."""
    problem: list[str] = []
    shared: list[dict[Any, Any]] = []
    own: dict[str, list[dict[Any, Any]]] = {}
    for override in overrides:
        name, colon, rest = override.partition(":")
        if not colon or "=" in name:  # the colon is one of the value
            name, rest = "", override
        key = rest.partition("=")[0]
        change = read_override(rest)
        if name and name not in names:
            raise UserError(f"override {override!r}: no algorithm is called {name!r}; {suggest(name, names)}")
        if key in OF_THE_PLAN:
            raise UserError(f"override {override!r}: {OF_THE_PLAN[key]} decides that")
        if name and not any(key == part or key.startswith(f"{part}.") for part in OWN):
            raise UserError(
                f"override {override!r}: all algorithms are to solve one problem; one alone may change {', '.join(OWN)}"
            )
        algorithm = change.get("algorithm", {})
        if not isinstance(algorithm, Mapping) or "preset" in algorithm:
            raise UserError(f"override {override!r}: --algorithms says which; algorithm.KEY=VALUE changes all of them")
        if name:
            own.setdefault(name, []).append(change)
        elif algorithm:
            shared.append(change)
        else:
            problem.append(override)
    return problem, shared, own


def _kept(algorithm: Algorithm, parts: Sequence[str]) -> list[dict[Any, Any]]:
    """Return the parts of the recipe's own algorithm that take the place of every preset's."""
    known, whole = [field.name for field in fields(algorithm)], asdict(algorithm)
    kept: list[dict[Any, Any]] = []
    for part in filter(None, parts):
        if part in known:
            kept.append({"algorithm": {part: whole[part]}})
        elif part in SHORT:
            owner, key = SHORT[part]
            kept.append({"algorithm": {owner: {key: whole[owner][key]}}})
        elif part == "grouping":
            settings = {short: whole[owner][key] for short, (owner, key) in GROUPING.items()}
            kept.append({"algorithm": {"grouping": settings}})
        else:
            raise UserError(f"--keep: an algorithm has no {part!r}; {suggest(part, [*SHORT, 'grouping', *known])}")
    return kept


def _settings(base: RunConfig, spec: Any, changes: Sequence[Mapping[Any, Any]], source: str) -> RunConfig:
    """Put one algorithm on the problem; every algorithm is evaluated with the guidance that the problem has."""
    tree = read_tree({**base.model_dump(mode="json"), "algorithm": spec}, source)
    for change in changes:
        tree = merge_choices(tree, read_tree(change, source))
    tree["evaluation"] |= base.evaluation.written_out(base.rollout)
    return RunConfig.parse(tree, source)


def _at_its_length(config: RunConfig, source: str, updates: int, points: int) -> RunConfig:
    """Return the run with a number of updates, evaluated `points` times at equal shares of it."""
    tree = config.model_dump(mode="json")
    tree["updates"] = updates
    tree["evaluation"]["every"] = math.ceil(updates / points)
    return RunConfig.parse(tree, source)


def _updates_within(config: RunConfig, budget: int, name: str, source: str) -> int:
    """Return the largest number of updates that cost no more than the budget; `source` says where that is from."""
    first = kind_of(config).planned_cost(config, 0)
    if first.total > budget:
        raise UserError(
            f"{source} are less than one update of {name}, which costs {first.total:,} "
            f"(rollout {first.rollout:,}, update {first.update:,})"
        )
    if budget / first.total > MOST_UPDATES:
        raise UserError(f"{source} buy {name} more than {MOST_UPDATES:,} updates; lower it")
    updates, spent = 1, first.total
    while (spent := spent + kind_of(config).planned_cost(config, updates).total) <= budget:
        updates += 1
    return updates
