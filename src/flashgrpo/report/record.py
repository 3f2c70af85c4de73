"""What a run directory says, read so that anything may be missing, cut short or not a number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashgrpo.errors import UserError
from flashgrpo.files import read_text
from flashgrpo.formats import number
from flashgrpo.jsontext import json_lines, read_json
from flashgrpo.settings import MANY

Row = Mapping[str, Any]  # one line of metrics.jsonl or evaluations.jsonl
Values = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Run:
    """What a run directory says, as far as it could be read."""

    path: Path
    config: str
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]  # by update, one row each
    evaluations: list[dict[str, Any]]
    result: Row | None  # the best checkpoint on noise that selected nothing, or else the headline evaluation
    notes: list[str]  # what is missing, in sentences


def read_run(path: Path) -> Run:
    if not path.is_dir():
        raise UserError(f"{path} is no run directory: there is no such folder.")
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is no run directory: it has no config.yaml.")
    notes: list[str] = []
    metrics = read_rows(path / "metrics.jsonl", notes)
    evaluations = read_rows(path / "evaluations.jsonl", notes)
    if not metrics:
        notes.append("No update has finished yet, so there are no training curves.")
    if not any(row["update"] > 0 for row in evaluations):
        notes.append("The tuned model has not been evaluated yet, so nothing is known about held-out prompts.")
    environment = read_mapping(path / "environment.json")
    if environment is None:
        notes.append("environment.json is missing or unreadable.")
        environment = {}
    config = read_text(path / "config.yaml")
    headline, confirmed = headline_evaluation(evaluations), read_mapping(path / "confirmation.json") or {}
    result = confirmed if headline and confirmed.get("update") == headline["update"] else headline
    return Run(path, config, environment, metrics, evaluations, result, notes)


def read_mapping(file: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where there is none."""
    try:
        value = read_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file by update. A resumed run repeats updates; the later row is the one that counts."""
    rows: dict[int, dict[str, Any]] = {}
    text = read_text(path) if path.is_file() else ""
    unreadable = 0
    for _, row in json_lines(text):
        update = row.get("update") if isinstance(row, dict) else None
        if isinstance(update, int) and not isinstance(update, bool) and 0 <= update <= MANY:
            rows[update] = row
        else:  # cut short by a kill, or not a row at all
            unreadable += 1
    if unreadable:
        count = "1 line" if unreadable == 1 else f"{unreadable} lines"
        notes.append(f"{count} of {path.name} could not be read, probably cut short when the run was stopped.")
    return [rows[update] for update in sorted(rows)]


def headline_evaluation(evaluations: Sequence[Row]) -> Row | None:
    """Return the evaluation whose videos are shown: the best checkpoint's, or the last where none beat the base."""
    best = [row for row in evaluations if row.get("best") is True]
    if best and best[-1]["update"] > 0:
        return best[-1]
    return evaluations[-1] if evaluations and evaluations[-1]["update"] > 0 else None


def samples_of(evaluation: Row | None) -> list[Row]:
    samples = evaluation.get("samples") if evaluation else None
    return [sample for sample in samples if isinstance(sample, Mapping)] if isinstance(samples, Sequence) else []


def column(rows: Sequence[Row], *keys: str) -> Values:
    """Return one value for each row, found along nested `keys`; nan where a row lacks it."""

    values: Sequence[Any] = rows
    for key in keys:  # a run has ten thousands of rows, and dict is far quicker to tell than Mapping
        values = [value.get(key) if isinstance(value, dict) else None for value in values]
    return np.array([number(value) for value in values], dtype=np.float64)


def names(rows: Sequence[Row], key: str) -> list[str]:
    """Return the keys of the mappings `row[key]`, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows if isinstance(row.get(key), Mapping) for name in row[key]))


def bounds(evaluations: Sequence[Row]) -> tuple[Values, Values]:
    """Return the lower and the upper ends of the intervals; nan where an evaluation has none."""
    intervals = (row.get("interval") for row in evaluations)
    pairs = [pair if isinstance(pair, list) and len(pair) == 2 else [None, None] for pair in intervals]
    return np.array([number(low) for low, _ in pairs]), np.array([number(high) for _, high in pairs])
