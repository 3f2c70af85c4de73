"""Prompts: from a file to the groups of an update, as a pure function of (seed, update)."""

import csv
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from flashgrpo.errors import UserError, first_line, install_hint, system_reason
from flashgrpo.files import resolve_path
from flashgrpo.jsontext import json_lines
from flashgrpo.seeds import generator
from flashgrpo.types import IMAGE_COLUMNS, Prompt, PromptGroup
from flashgrpo.video import image_bytes

RESERVED = ("videos", "prompts", "self")
"""What a column cannot be called, since rewards take the columns as keywords beside these arguments."""

NESTED = 50  # levels of lists and objects in a column


def read_prompts(path: str, key: str) -> list[Prompt]:
    """Read a prompt file; empty lines are skipped.

    .txt has a prompt a line; lines that begin with # are comments. .jsonl, .csv and .parquet have a column `prompt`,
    and the others reach the rewards, as text from a .csv; a column that a line lacks is None there. Paths in a column
    `image` are taken from the file's folder. `datasets:NAME` or `datasets:NAME:SPLIT` is a data set of the hub, or one
    in a folder, with the same columns; split train by default.

    Args:
        key: the setting that names the file, for the sentence that a bad one gets.

    Raises:
        UserError: missing, not UTF-8, empty, or a line that is no prompt.
    """
    if path.startswith("datasets:"):
        return _uniform(_read_dataset(path.removeprefix("datasets:"), f"{key}: {path}"), f"{key}: {path}")
    file = Path(resolve_path(path))
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"{key}: {file} must end in {', '.join(READERS)}")
    prompts = reader(file, f"{key}: {file}")
    return _uniform([_with_image_paths(prompt, file.parent) for prompt in prompts], f"{key}: {file}")


def _with_image_paths(prompt: Prompt, folder: Path) -> Prompt:
    images = {name: prompt.columns[name] for name in IMAGE_COLUMNS if name in prompt.columns}
    return replace(prompt, columns={**prompt.columns, **{name: _placed(one, folder) for name, one in images.items()}})


def _placed(image: Any, folder: Path) -> Any:
    path = image.get("path") if isinstance(image, dict) else image
    if not isinstance(path, str):
        return image
    path = str((folder / resolve_path(path)).absolute())
    return {**image, "path": path} if isinstance(image, dict) else path


def _uniform(prompts: list[Prompt], where: str) -> list[Prompt]:
    """Give every prompt the columns of all of them, in the order in which they are met."""
    if not prompts:
        raise UserError(f"{where} has no prompts")
    columns = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    if taken := [name for name in columns if name in RESERVED]:
        raise UserError(f"{where} has a column {taken[0]!r}, an argument that every reward has; rename it")
    return [replace(prompt, columns={**columns, **prompt.columns}) for prompt in prompts]


def _read_text(file: Path, where: str) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:  # a path that holds NUL is a ValueError
        if isinstance(error, UnicodeDecodeError):
            raise UserError(f"{where} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
        raise UserError(f"{where} cannot be read: {system_reason(error)}") from error


def _read_txt(file: Path, where: str) -> list[Prompt]:
    lines = enumerate(re.split("\r\n?|\n", _read_text(file, where)), 1)
    return [
        _prompt({"prompt": line}, f"{where} line {n}") for n, line in lines if line.strip() and not line.startswith("#")
    ]


def _read_jsonl(file: Path, where: str) -> list[Prompt]:
    prompts = []
    for n, record in json_lines(_read_text(file, where)):
        if isinstance(record, ValueError):
            raise UserError(f"{where} line {n} is no JSON: {first_line(record)}") from record
        _check_depth(record, f"{where} line {n}")
        prompts.append(_prompt(record, f"{where} line {n}"))
    return prompts


def _check_depth(record: Any, where: str) -> None:
    level = [record]
    for _ in range(NESTED):
        level = [
            v for one in level if isinstance(one, dict | list) for v in (one.values() if isinstance(one, dict) else one)
        ]
    if level:
        raise UserError(f"{where} is nested more than {NESTED} deep")


def _read_csv(file: Path, where: str) -> list[Prompt]:
    """Read rows below a header; a column without a name, as a table's row numbers often are, is left out."""
    reader = csv.DictReader(io.StringIO(_read_text(file, where), newline=""), strict=True)
    try:
        names = [name for name in reader.fieldnames or () if name]
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{where} line {reader.reader.line_num} is no CSV: {error}") from error
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where} has two columns {twice[0]!r}; rename one of them")
    if rows and "prompt" not in names:
        raise UserError(f"{where} has no column prompt in its first line, only {', '.join(names)}")
    for n, row in rows:
        if None in row or None in row.values():
            raise UserError(f"{where} line {n} has another number of fields than the header")
    return [_prompt({name: row[name] for name in names}, f"{where} line {n}") for n, row in rows]


def _read_parquet(file: Path, where: str) -> list[Prompt]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{where} needs pyarrow: {install_hint('data')}") from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            rows = table.read().to_pylist()
    except Exception as error:  # of the system, of pyarrow, or of Python for values that it has no type for
        raise UserError(f"{where} cannot be read: {system_reason(error)}") from error
    return [_prompt(row, f"{where} row {n}") for n, row in enumerate(rows, 1)]


def _read_dataset(name: str, where: str) -> list[Prompt]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{where} needs datasets: {install_hint('data')}") from error
    name, colon, split = name.rpartition(":")
    name, split = (name, split) if colon else (split, "train")
    try:
        rows = [dict(row) for row in datasets.load_dataset(name, split=split)]
    except Exception as error:  # of a dozen kinds: no such set, no such split, no network, no readable file or picture
        raise UserError(f"{where} cannot be loaded: {first_line(error)}") from error
    return [_prompt(row, f"{where} row {n}") for n, row in enumerate(rows, 1)]


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


def _prompt(record: Any, where: str) -> Prompt:
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise UserError(f'{where} must be an object with a text under "prompt"')
    if "\0" in record["prompt"]:
        raise UserError(f"{where} holds a NUL character, as a text has that was saved as UTF-16; save it as UTF-8")
    return Prompt(record.pop("prompt").strip(), record)


def prompt_groups(
    prompts: Sequence[Prompt], seed: int, update: int, groups: int, group_size: int, anchored: bool = False
) -> list[PromptGroup]:
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
        chosen.append(PromptGroup(update, group, prompts[orders[walk][place]], group_size, anchored))
    return chosen


def trained_on(heldout: Sequence[Prompt], train: Sequence[Prompt], images: bool) -> int:
    """Count the held-out prompts that are training prompts: the same words, whatever their case and spaces.

    Args:
        images: prompts come with a first frame, which has to be the same as well.
    """
    words = [_words(prompt) for prompt in heldout]
    known: dict[str, list[Prompt]] = {text: [] for text in words}
    for prompt in train:
        if (text := _words(prompt)) in known:
            known[text].append(prompt)
    return sum(
        any(not images or _images_of(prompt) == _images_of(other) for other in known[text])
        for prompt, text in zip(heldout, words, strict=True)
    )


def _words(prompt: Prompt) -> str:
    return " ".join(prompt.text.casefold().split())


@lru_cache(maxsize=1024)
def _digest(path: str) -> bytes:
    return hashlib.sha256(image_bytes(path)).digest()


def _images_of(prompt: Prompt) -> bytes:
    """Return the digests of a prompt's images."""
    images = [image for name in IMAGE_COLUMNS if (image := prompt.columns.get(name)) is not None]
    each = [_digest(one) if isinstance(one, str) else hashlib.sha256(image_bytes(one)).digest() for one in images]
    return b"".join(each)


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Collect column -> values, one for each prompt, as rewards take them."""
    return {name: [prompt.columns[name] for prompt in prompts] for name in prompts[0].columns}
