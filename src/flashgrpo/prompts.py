"""Prompts: from a file to the groups of an update, as a pure function of (seed, update)."""

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flashgrpo.errors import UserError, first_line
from flashgrpo.files import json_lines, resolve_path
from flashgrpo.seeds import generator
from flashgrpo.types import Prompt, PromptGroup


def read_prompts(path: str, key: str) -> list[Prompt]:
    """Read a prompt file; empty lines are skipped.

    .txt has a prompt a line; .jsonl, .csv and .parquet have a column `prompt`, and the others reach the rewards,
    as text from a .csv. Paths in a column `image` are taken from the file's folder. `datasets:NAME` or
    `datasets:NAME:SPLIT` is a data set of the hub, or one in a folder, with the same columns; split train by default.

    Args:
        key: the setting that names the file, for the sentence that a bad one gets.

    Raises:
        UserError: missing, not UTF-8, empty, a line that is no prompt, or columns that differ from line to line.
    """
    if path.startswith("datasets:"):
        return _uniform(_read_dataset(path.removeprefix("datasets:"), f"{key}: {path}"), f"{key}: {path}")
    file = Path(resolve_path(path))
    if file.suffix not in READERS:
        raise UserError(f"{key}: {file} must end in {', '.join(READERS)}")
    prompts = READERS[file.suffix](file, f"{key}: {file}")
    return _uniform([_with_image_path(prompt, file.parent) for prompt in prompts], f"{key}: {file}")


def _with_image_path(prompt: Prompt, folder: Path) -> Prompt:
    image = prompt.columns.get("image")
    if not isinstance(image, str):
        return prompt
    return replace(prompt, columns={**prompt.columns, "image": str((folder / image).absolute())})


def _uniform(prompts: list[Prompt], where: str) -> list[Prompt]:
    if not prompts:
        raise UserError(f"{where} has no prompts")
    for n, prompt in enumerate(prompts, 1):
        if prompt.columns.keys() != prompts[0].columns.keys():
            raise UserError(f"{where} prompt {n} has other columns than the first; give every line the same")
    return prompts


def _read_text(file: Path, where: str) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{where} cannot be read: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _read_txt(file: Path, where: str) -> list[Prompt]:
    return [Prompt(line.strip(), {}) for line in _read_text(file, where).split("\n") if line.strip()]


def _read_jsonl(file: Path, where: str) -> list[Prompt]:
    prompts = []
    for n, record in json_lines(_read_text(file, where)):
        if isinstance(record, ValueError):
            raise UserError(f"{where} line {n} is no JSON") from record
        prompts.append(_prompt(record, f"{where} line {n}"))
    return prompts


def _read_csv(file: Path, where: str) -> list[Prompt]:
    reader = csv.DictReader(io.StringIO(_read_text(file, where), newline=""), restkey="", restval=None)
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{where} line {reader.line_num} is no CSV: {error}") from error
    for n, row in rows:
        if "" in row or None in row.values():
            raise UserError(f"{where} line {n} has another number of fields than the header")
    return [_prompt(row, f"{where} line {n}") for n, row in rows]


def _read_parquet(file: Path, where: str) -> list[Prompt]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{where} needs pyarrow: pip install 'flash-grpo[data]'") from error
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{where} cannot be read: {first_line(error)}") from error
    return [_prompt(row, f"{where} row {n}") for n, row in enumerate(rows, 1)]


def _read_dataset(name: str, where: str) -> list[Prompt]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{where} needs datasets: pip install 'flash-grpo[data]'") from error
    name, colon, split = name.rpartition(":")
    name, split = (name, split) if colon else (split, "train")
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # of a dozen kinds: no such set, no such split, no network, no readable file
        raise UserError(f"{where} cannot be loaded: {first_line(error)}") from error
    return [_prompt(dict(row), f"{where} row {n}") for n, row in enumerate(rows, 1)]


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


def _prompt(record: Any, where: str) -> Prompt:
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise UserError(f'{where} must be an object with a text under "prompt"')
    return Prompt(record.pop("prompt").strip(), record)


def prompt_groups(prompts: Sequence[Prompt], seed: int, update: int, groups: int, group_size: int) -> list[PromptGroup]:
    """Choose the prompt groups of an update, without any state.

    The file is walked in passes, each in an order of its own: group g of update u takes place u * groups + g of the
    walk, so no prompt comes a second time before every one has come once.
    """
    chosen = []
    orders: dict[int, list[int]] = {}
    for group in range(groups):
        walk, place = divmod(update * groups + group, len(prompts))
        if walk not in orders:
            orders[walk] = torch.randperm(len(prompts), generator=generator(seed, "prompts", walk)).tolist()
        chosen.append(PromptGroup(update, group, prompts[orders[walk][place]], group_size))
    return chosen


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Collect column -> values, one for each prompt, as rewards take them."""
    return {name: [prompt.columns[name] for prompt in prompts] for name in prompts[0].columns}
