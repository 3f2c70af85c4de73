"""Which process an algorithm is of: its `explore` says it, and `rollout` and `evaluation` are settings of that one."""

from collections.abc import Mapping
from typing import Any, get_args

from flashgrpo.presets import PRESETS, Algorithm, AnyExplore
from flashgrpo.processes.flow.choices import FLOW

PROCESS_OF: Mapping[str, str] = {kind.kind: kind.process for kind in get_args(get_args(AnyExplore)[0])}
"""`explore.kind` -> the process that explores so, which is the `kind` of `rollout` and `evaluation`."""


def process_of(algorithm: Any) -> str:
    """Return the process of an algorithm, or of a recipe's; of one that is not valid, flow."""
    explore = algorithm.explore if isinstance(algorithm, Algorithm) else _explore(algorithm)
    kind = explore.get("kind") if isinstance(explore, Mapping) else getattr(explore, "kind", None)
    return PROCESS_OF.get(kind, FLOW) if isinstance(kind, str) else FLOW


def _explore(algorithm: Any) -> Any:
    name, changes = (algorithm, {}) if isinstance(algorithm, str) else ("flash-grpo", algorithm)
    if not isinstance(changes, Mapping):
        return None
    explore = changes.get("explore", {})
    name = changes.get("preset", name)
    if isinstance(explore, Mapping) and "kind" in explore:
        return explore
    return PRESETS[name].explore if isinstance(name, str) and name in PRESETS else None


def of_its_process(tree: Any) -> Any:
    """Give `rollout` and `evaluation` of a recipe the kind that its algorithm needs, where they name none."""
    if not isinstance(tree, Mapping):
        return tree
    kind, whole = process_of(tree.get("algorithm", "flash-grpo")), dict(tree)
    for part in ("rollout", "evaluation"):
        given = whole.get(part, {})
        if isinstance(given, Mapping) and "kind" not in given:
            whole[part] = {"kind": kind, **given}
    return whole


def check_one_process(algorithm: Algorithm, **kinds: str) -> None:
    """Refuse parts that belong to another process than the algorithm's `explore`, with a ValueError.

    Args:
        kinds: part of the recipe -> the process that its kind belongs to.
    """
    process, explore = algorithm.explore.process, algorithm.explore.kind
    for name, kind in kinds.items():
        if kind != process:
            raise ValueError(f"{name}.kind: the algorithm's explore.kind {explore} is of {process}; leave it out")
    if algorithm.score.process != process:
        raise ValueError(
            f"algorithm.score.kind: explore.kind {explore} is {process}, and score.kind {algorithm.score.kind} is "
            f"{algorithm.score.process}; take a preset of one of the two"
        )
