"""Where recipes lie, and how settings merge."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from flashgrpo.config.reading import check_tree, read_yaml
from flashgrpo.errors import UserError
from flashgrpo.files import PACKAGE

RECIPE_FOLDERS = (PACKAGE / "recipes", PACKAGE.parent.parent / "recipes")  # installed; in a checkout


def shipped_recipes() -> dict[str, Path]:
    """Return name -> file of the recipes that come with the package."""
    return {file.stem: file for folder in RECIPE_FOLDERS for file in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str) -> Path:
    """Find the file itself, or `recipes/NAME.yaml` of the package."""
    path = Path(recipe)
    with contextlib.suppress(OSError, ValueError):  # too long for a path, or with NUL: it is none
        if path.is_file():
            return path
    shipped = shipped_recipes()
    if recipe in shipped:
        return shipped[recipe]
    raise UserError(f"there is no recipe {recipe}; give a YAML file or one of: {', '.join(sorted(shipped))}")


def parse_override(
    override: str, is_text: Callable[[Sequence[str], str], bool] = lambda keys, typed: False
) -> dict[Any, Any]:
    """`optim.lr=1e-4` as nested settings; the value is read as YAML, or is what was typed where a setting is text.

    Args:
        is_text: whether a setting, by its keys, means the text that was typed.

    Raises:
        UserError: it has no key, or the value is no YAML.
    """
    key, equals, typed = override.partition("=")
    keys = key.split(".")
    if not equals or not all(keys):
        raise UserError(f"override {override!r:.200} must have the form key=value, for example optim.lr=1e-4")
    try:
        check_tree(override)
        value = typed if is_text(keys, typed) else read_yaml(typed)
    except ValueError as error:
        raise UserError(f"override {override!r:.200} cannot be read: {error}") from error
    for part in reversed(keys):
        value = {part: value}
    return cast(dict[Any, Any], value)


def merge_choices(old: Mapping[Any, Any], changes: Mapping[Any, Any]) -> dict[Any, Any]:
    """Merge nested settings; a change of `kind` or `preset` drops the settings of the one before.

    A change below a name merges with that name's preset: {"algorithm": "flash-grpo"} and {"algorithm": {"kl_coef": 1}}.
    """
    merged = dict(old)
    for key, new in changes.items():
        before = merged.get(key)
        if isinstance(before, str) and isinstance(new, Mapping):
            before = {"preset": before}
        if (
            isinstance(before, Mapping)
            and isinstance(new, Mapping)
            and all(new.get(name) in (None, before.get(name)) for name in ("kind", "preset"))
        ):
            new = merge_choices(before, new)
        merged[key] = new
    return merged


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys under which two trees of settings differ; what one of them lacks is None there."""
    keys: list[str] = []
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            keys += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            keys.append(prefix + key)
    return keys


def value_at(tree: Any, key: str) -> Any:
    """Return the setting of a dotted key; None where there is none."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


GONE: Mapping[str, tuple[Any, str]] = {
    "algorithm.score.weighting.over": ("window", "the mean of the weights is over the window of steps"),
    "parallel.context_kind": ("ulysses", "ring attention never ran"),
    "optim.eight_bit": (False, "AdamW keeps its moments in 32 bits"),
}
"""Settings that older recipes and runs may hold: the value that is now the only one, and why."""


def without_gone(tree: Mapping[Any, Any], name: Callable[[str], str] = str) -> dict[Any, Any]:
    """Leave out settings that are gone.

    Args:
        name: turns the key of a setting into what the user calls it.

    Raises:
        ValueError: one has another value than the only one left.
    """
    kept = dict(tree)
    for path, (only, why) in GONE.items():
        *above, key = path.split(".")
        node: Any = tree
        for part in above:
            node = node.get(part) if isinstance(node, Mapping) else None
        if not isinstance(node, Mapping) or key not in node:
            continue
        if node[key] != only:
            raise ValueError(f"{name(path)}: {node[key]!r:.80} is gone, since {why}; leave the setting out")
        kept = _without(kept, path.split("."))
    return kept


def _without(tree: Mapping[Any, Any], path: Sequence[str]) -> dict[Any, Any]:
    """Return the tree without one of its leaves."""
    first, *rest = path
    if not rest:
        return {key: value for key, value in tree.items() if key != first}
    return {**tree, first: _without(tree[first], rest)}
