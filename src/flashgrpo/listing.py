"""What there is to choose from: recipes, rewards, presets, models and processes, each described by what owns it.

Nothing is kept here: recipes and models come from the recipes that ship, rewards from their files (read, not imported),
presets from their values, processes from their packages.
"""

import ast
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import TypeAdapter
from rich.console import Console

from flashgrpo.config.processes import process_of
from flashgrpo.config.reading import read_yaml
from flashgrpo.config.recipe import differences, shipped_recipes, value_at
from flashgrpo.errors import UserError, suggest
from flashgrpo.files import PACKAGE
from flashgrpo.jsontext import to_json
from flashgrpo.outlets import check_arrived
from flashgrpo.presets import FLASH_GRPO, PRESETS, Algorithm, AnyExplore
from flashgrpo.terminal import cell

PARTS = ("recipes", "rewards", "presets", "models", "processes")


def listing() -> dict[str, dict[str, str]]:
    """Return part -> name -> what it is, in one line; neither a reward nor torch is imported."""
    found = (_recipes(), dict(_rewards()), _presets(), _models(), _processes())
    return dict(zip(PARTS, found, strict=True))


def print_listing(
    part: Annotated[str | None, typer.Argument(help="recipes, rewards, presets, models or processes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead.")] = False,
) -> None:
    """Print what there is to choose from, one line each."""
    if part is not None and part not in PARTS:
        raise UserError(f"list: there is no part {part!r}; {suggest(part, PARTS)}")
    parts = {name: lines for name, lines in listing().items() if part in (None, name)}
    if as_json:
        print(to_json(parts))
        return check_arrived()
    console = Console()
    for name, lines in parts.items():
        console.print(cell(name, "italic"))
        width = max(map(len, lines), default=0)
        for key, line in lines.items():  # whole, however narrow the window: names are there to be copied
            console.print(cell(f" {key:{width}}", "bold") + cell(f"  {line}"), soft_wrap=True)
    check_arrived()


def _recipes() -> dict[str, str]:
    """Describe each by the first sentence of its comments."""
    found = {}
    for name, file in shipped_recipes().items():
        lines = [line[1:].strip() for line in file.read_text("utf-8").splitlines() if line.startswith("#")]
        told = takewhile(lambda line: not line.startswith("Hardware:"), lines)
        words = " ".join(line for line in told if not line.startswith("yaml-language-server"))
        found[name] = words.partition(". ")[0].removesuffix(".")
    return found


def _rewards() -> Iterator[tuple[str, str]]:
    """Yield what a recipe names as `call`, and the first line of its docstring."""
    for file in sorted((PACKAGE / "rewards").glob("*.py")):
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and _is_reward(node):
                name = f"flashgrpo.rewards.{file.stem}:{node.name}"
                yield name, (ast.get_docstring(node) or "").partition("\n")[0]


def _is_reward(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether it can be called with what was drawn and its prompts."""
    if isinstance(node, ast.ClassDef):
        return any(_is_reward(part) for part in node.body if getattr(part, "name", "") == "__call__")  # type: ignore[arg-type]
    names = [argument.arg for argument in node.args.args if argument.arg != "self"]
    return names[:2] in (["videos", "prompts"], ["images", "prompts"], ["texts", "prompts"])


def _presets() -> dict[str, str]:
    """Describe each by what it does otherwise than flash-grpo, or by its parts where it explores otherwise."""
    values = TypeAdapter(Algorithm)
    usual = values.dump_python(FLASH_GRPO, mode="json")
    return {name: _described(usual, values.dump_python(preset, mode="json")) for name, preset in PRESETS.items()}


def _described(usual: Mapping[str, Any], preset: Mapping[str, Any]) -> str:
    process = process_of({"explore": {"kind": value_at(preset, "explore.kind")}})
    if value_at(preset, "explore.kind") != value_at(usual, "explore.kind"):
        kinds = ", ".join(f"{part} {value_at(preset, f'{part}.kind')}" for part in ("explore", "score", "objective"))
        return f"{process}: {kinds}"
    changed = differences(usual, preset)
    chosen = {key.removesuffix("kind") for key in changed if key.endswith(".kind")}  # says more than its settings
    shown = [key for key in changed if key.endswith(".kind") or not key.startswith(tuple(chosen))]
    otherwise = ", ".join(f"{key}={to_json(value_at(preset, key))}" for key in shown)
    return f"{process}: " + (f"flash-grpo with {otherwise}" if otherwise else "one rectified step of each group")


def _models() -> dict[str, str]:
    """Describe the checkpoint of each recipe by the process that draws from it and by the recipes that train it."""
    recipes: dict[tuple[str, str], list[str]] = {}
    for name, file in shipped_recipes().items():
        recipe = read_yaml(file.read_text("utf-8"))
        assert isinstance(recipe, Mapping)
        key = recipe["model"]["path"], process_of(recipe.get("algorithm", "flash-grpo"))
        recipes.setdefault(key, []).append(name)
    return {path: f"{process}; recipes: {', '.join(names)}" for (path, process), names in recipes.items()}


def _processes() -> dict[str, str]:
    """Describe each by the first line of its package, which is found beside its settings."""
    kinds = get_args(get_args(AnyExplore)[0])
    packages = {kind.process: kind.__module__.rpartition(".")[0] for kind in kinds}
    return {name: _first_line(package) for name, package in packages.items()}


def _first_line(package: str) -> str:
    spec = find_spec(package)
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8"))) if spec and spec.origin else None
    return (docstring or "").partition("\n")[0]
