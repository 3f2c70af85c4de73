"""`flashgrpo evaluate`: a run's checkpoint on held-out prompts, paired with its base model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flashgrpo.config.recipe import parse_override
from flashgrpo.errors import UserError
from flashgrpo.formats import Numbers
from flashgrpo.jsontext import to_json
from flashgrpo.terminal import cell


def evaluate(target: str | Path, overrides: Sequence[str] = (), checkpoint_update: int | None = None) -> dict[str, Any]:
    """Evaluate a run's checkpoint (the best by default) against its base model; of a recipe, the base model alone.

    Returns:
        A record as in evaluations.jsonl. A checkpoint that was selected as the best of several evaluations is scored on
        other noise than they were, as in confirmation.json; `selected_from` then says of how many. Nothing is written.

    Raises:
        UserError: `target` is neither a run with a checkpoint nor a recipe, or an override or setting is bad.
    """
    is_run = Path(target).is_dir()
    for override in overrides if is_run else ():
        if not parse_override(override).keys() & {"evaluation", "rewards", "prompts", "parallel"}:
            raise UserError(f"override {override!r} has no effect on an evaluation")
    if checkpoint_update is not None and not is_run:
        raise UserError(f"--checkpoint: {target} is no run directory, so it has no checkpoints")
    from flashgrpo.evaluation import evaluate_checkpoint  # brings torch, which `import flashgrpo` does without

    return evaluate_checkpoint(target, overrides, checkpoint_update)


def print_record(record: dict[str, Any], as_json: bool) -> None:
    """Print an evaluation as a table of its rewards, base beside tuned, and its result in a sentence."""
    from flashgrpo.run.progress import describe  # brings torch

    if as_json:
        print(to_json(record))
        return
    tuned = [f"update {record['update']}"] if record["update"] else []
    table = Table("", "base", *tuned)
    for kind in ("rewards", "watched"):
        for name, value in record[kind].items():
            base, label = record[f"base_{kind}"][name], name if kind == "rewards" else f"{name} (watched)"
            form = Numbers.alone(base, value)
            table.add_row(cell(label), form.plain(base), *(form.plain(value) for _ in tuned))
    Console().print(table)
    print(describe(record))
