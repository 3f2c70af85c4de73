"""`flashgrpo init`: a recipe of one's own from a few answers, with the comments of a recipe that ships.

The text of the shipped recipe is kept; only the settings that were answered are written anew, so that what its comments
say of hardware and settings stays beside them.
"""

import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from flashgrpo.config import RunConfig
from flashgrpo.config.reading import read_yaml
from flashgrpo.config.recipe import shipped_recipes
from flashgrpo.errors import UserError, suggest, this_command
from flashgrpo.files import write_text
from flashgrpo.jsontext import to_json
from flashgrpo.outlets import check_arrived
from flashgrpo.terminal import PATH_TEXT, path

Value = TypeVar("Value", str, int, float)


@dataclass(frozen=True)
class Answers:
    """What a recipe is written from; None is what has not been answered.

    Args:
        model: name of the recipe that ships, whose model and settings are taken.
        weights: `model.path` in place of its own.
        reward: what `rewards.NAME.call` says; the recipe's own rewards where it is empty.
        prompts: the file of training prompts; the recipe's own where it is empty.
        heldout: the file of held-out prompts; the recipe's own where it is empty.
        gpus: processes, one a GPU.
        card: GiB of a GPU; 0 is the CPU.
    """

    model: str | None = None
    weights: str | None = None
    reward: str | None = None
    prompts: str | None = None
    heldout: str | None = None
    gpus: int | None = None
    card: float | None = None


def init(
    out: Annotated[Path, typer.Argument(parser=path, help="The recipe to write.")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option(help="A recipe that ships, whose model and settings to take.")] = None,
    weights: Annotated[str | None, typer.Option(**PATH_TEXT, help="model.path in place of that recipe's.")] = None,
    reward: Annotated[str | None, typer.Option(help="motion:amount, file.py:function, http://HOST:PORT ...")] = None,
    prompts: Annotated[str | None, typer.Option(**PATH_TEXT, help="The file of training prompts.")] = None,
    heldout: Annotated[str | None, typer.Option(**PATH_TEXT, help="The file of held-out prompts.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Processes, one a GPU.")] = None,
    card: Annotated[float | None, typer.Option(min=0, help="GiB of a GPU; 0 for the CPU.")] = None,
) -> None:
    """Write a commented recipe from a few answers, and count the memory that it needs."""
    if out.exists():
        raise UserError(f"{out} exists; name another file, or remove it")
    fits = write_recipe(out, ask(Answers(model, weights, reward, prompts, heldout, gpus, card)))
    check_arrived()
    raise typer.Exit(0 if fits else 1)


def ask(answers: Answers) -> Answers:
    """Ask for what is missing, in a terminal; elsewhere what the recipe itself says is taken.

    Raises:
        UserError: there is no terminal and no model was named, or it is not one that ships.
    """
    asks = sys.stdin.isatty()
    if answers.model is None and not asks:
        raise UserError(f"--model: name a recipe to begin with, one of: {', '.join(sorted(shipped_recipes()))}")
    if answers.model is None:
        answers = replace(answers, model=asked("Model, the name of a recipe", "tiny", _recipe))
    try:
        _recipe(answers.model or "")
    except ValueError as error:
        raise UserError(f"--model: {error}") from error
    if not asks:
        return answers
    for key, question in (
        ("reward", "Reward (module:function, file.py:function, http://...; empty: the recipe's own)"),
        ("prompts", "File of training prompts (empty: the recipe's own)"),
        ("heldout", "File of held-out prompts (empty: the recipe's own)"),
    ):
        if getattr(answers, key) is None:
            answers = replace(answers, **{key: typer.prompt(question, default="", show_default=False)})
    if answers.card is None:
        answers = replace(answers, card=asked("GiB of a GPU, 0 for the CPU", "0", _gib))
    if answers.gpus is None and answers.card:
        answers = replace(answers, gpus=asked("Number of GPUs", "1", _count))
    return answers


def asked(question: str, default: str, read: Callable[[str], Value]) -> Value:
    """Ask until an answer can be read; `read` raises a ValueError that says why one cannot. Enter is the default."""

    def value(answer: str) -> Value:
        try:
            return read(answer)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error

    return typer.prompt(question, default=default, value_proc=value)


def _recipe(name: str) -> str:
    if name not in (names := sorted(shipped_recipes())):
        raise ValueError(f"there is no recipe {name!r}; {suggest(name, names)}")
    return name


def _gib(answer: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", answer):
        raise ValueError(f"{answer!r} is no number of GiB")
    return float(answer)


def _count(answer: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", answer):
        raise ValueError(f"{answer!r} is no number of GPUs")
    return int(answer)


def write_recipe(out: Path, answers: Answers) -> bool:
    """Write the recipe and print the estimate of its memory; returns whether that fits the card, where one is given.

    Raises:
        UserError: the recipe would be refused; then nothing is written.
    """
    from flashgrpo.doctor.verdict import print_estimate  # brings torch
    from flashgrpo.prompts import read_prompts

    text = recipe_text(out, answers)
    config = RunConfig.parse(read_yaml(text), str(out))
    write_text(out, text)
    print(f"wrote {out}")
    fits = print_estimate(config, answers.gpus, answers.card or None, as_json=False)
    for key, file in (("prompts.train", config.prompts.train), ("prompts.heldout", config.prompts.heldout)):
        try:
            read_prompts(file, key)
        except UserError as error:
            print(f"before it trains: {error}")
    print(f"next: {this_command()} train {shlex.quote(str(out))} --dry-run")
    return fits


def recipe_text(out: Path, answers: Answers) -> str:
    """Return the shipped recipe's text with the answers in it."""
    assert answers.model is not None
    text = shipped_recipes()[answers.model].read_text("utf-8")
    recipe = read_yaml(text)
    origin = f"# Begun from the recipe {answers.model} by `flashgrpo init`, of whose runs the comments tell.\n"
    text = re.sub(r"\A(# yaml-language-server.*\n)?", lambda head: head[0] + origin, text)
    text = _with_block(text, "out", f"out: {to_json(f'runs/{out.stem}')}\n")
    if answers.weights:
        text = re.sub(r"(?m)^  path: .*$", lambda _: f"  path: {to_json(answers.weights)}", text, count=1)
    if answers.prompts or answers.heldout:
        files = {"train": answers.prompts, "heldout": answers.heldout}
        own = {key: file or recipe["prompts"][key] for key, file in files.items()}
        lines = [f"  {key}: {to_json(file)}\n" for key, file in {**recipe["prompts"], **own}.items()]
        text = _with_block(text, "prompts", f"prompts:\n{''.join(lines)}")
    if answers.reward:
        name = re.sub(r"\W+", "_", answers.reward.rpartition(":")[2] if "//" not in answers.reward else "served")
        call = answers.reward
        if re.fullmatch(r"[a-z_0-9]+:\w+", call):  # of those that ship, as `flashgrpo reward` names them
            call = f"flashgrpo.rewards.{call}"
        text = _with_block(text, "rewards", f"rewards:\n  {name}: {{call: {to_json(call)}}}\n")
    return text


def _with_block(text: str, key: str, block: str) -> str:
    """Replace a setting at the top of a recipe, with all lines below it that are indented."""
    return re.sub(rf"(?m)^{key}:.*\n(?:[ \t]+.*\n)*", lambda _: block, text, count=1)
