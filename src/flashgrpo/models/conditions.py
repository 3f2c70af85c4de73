"""What prompts are turned into for the network, computed once and kept on disk.

A text encoder is many times larger than what it says about a prompt. So each prompt is encoded once, before the network
is loaded, and no encoder is in memory while a run trains. Any number of processes may fill one folder at a time: every
entry appears whole under a name of its own, and whoever finds it there does not compute it again.
"""

import contextlib
import hashlib
import importlib.metadata as metadata
import json
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashgrpo.files import cache_folder, explain_os_errors
from flashgrpo.types import Condition, Prompt
from flashgrpo.video import image_bytes

SAMPLE = 2**20  # bytes read at the start, in the middle and at the end of a file to tell it from others

Row = Mapping[str, Tensor]


def fingerprint(folder: Path, parts: Sequence[str], settings: Mapping[str, Any]) -> str:
    """Tells encoders apart: the files of the named parts of a pipeline folder, and the settings that count.

    A part is a folder or a file.

    Of each file its size and three samples of 1 MiB are read, since to read a text encoder whole would take as long as
    to load it.
    """
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True, default=str).encode())
    for file in sorted(file for part in parts for file in _files(folder / part)):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}\n".encode())
        with file.open("rb") as content:
            for place in sorted({0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)}):
                content.seek(place)
                digest.update(content.read(SAMPLE))
    return digest.hexdigest()


def _files(part: Path) -> list[Path]:
    """Return the files of a part: those below the folder, or itself."""
    return [part] if part.is_file() else [file for file in part.rglob("*") if file.is_file()]


def entries_of(folder: Path, parts: Sequence[str], settings: Mapping[str, Any], cache: str | None = None) -> Path:
    """Return where the rows lie that the encoders in `folder` make: below `cache`, or below `cache_folder()`."""
    packages = {name: metadata.version(name) for name in ("diffusers", "transformers")}  # they clean and cut texts
    weights = {"weights": "checked"}  # older entries may be of encoders that lacked some
    digest = fingerprint(folder, parts, {**settings, **packages, **weights})[:32]
    return (Path(cache) if cache else cache_folder() / "conditions") / digest


class Conditions:
    """The condition of any prompt: from memory, from disk, or from the encoders.

    Args:
        folder: of this model's entries; None keeps nothing on disk.
        compute: the row of one prompt: name -> tensor (1, ...). It loads the encoders where they are not loaded yet.
        images: which columns of a prompt have images that count.
        keep: bytes of rows that stay in memory, those used last.
    """

    def __init__(
        self, folder: Path | None, compute: Callable[[Prompt], Row], images: Sequence[str] = (), keep: int = 2**30
    ) -> None:
        self._folder = folder
        self._compute = compute
        self._images = images
        self._keep = keep
        self._rows: OrderedDict[str, _Unpadded] = OrderedDict()
        self._held = 0

    def __call__(self, prompts: Sequence[Prompt], device: torch.device | None = None) -> Condition:
        """Return the rows of the prompts, on the CPU or a device, to which a prompt of many samples travels once.

        Prompts are encoded one at a time: a prompt's row must not depend on which others were new with it, or a resumed
        run would differ in the last bits.
        """
        keys = [self._key(prompt) for prompt in prompts]
        distinct = dict(zip(keys, prompts, strict=True))
        places = {key: place for place, key in enumerate(distinct)}
        rows = Condition.stack([Condition(self._row(key, prompt)) for key, prompt in distinct.items()])
        if device is not None:
            rows = rows.to(device)
        return rows if len(distinct) == len(keys) else rows[torch.tensor([places[key] for key in keys])]

    def missing(self, prompts: Sequence[Prompt], part: int = 0, parts: int = 1) -> list[int]:
        """Return the numbers of the prompts that are not on disk yet, each once, looking at one of several parts.

        Ranks that see the same folder look at a part each: to open every entry on every rank is what a shared disk
        answers slowest.
        """
        if self._folder is None:
            return []
        numbers = range(part, len(prompts), parts)
        by_key = {self._key(prompts[number]): number for number in reversed(numbers)}
        return sorted(number for key, number in by_key.items() if not _is_whole(self._file(key)))

    def fill(self, prompts: Sequence[Prompt], begin: float = 0.0) -> None:
        """Bring what is missing of the prompts to disk.

        Args:
            begin: where in the list to begin, from 0 to 1. Processes that begin at different places share the work.

        Raises:
            UserError: the folder cannot be written, or a prompt cannot be encoded.
        """
        self._clear_leftovers()
        first = int(begin * len(prompts))
        for prompt in [*prompts[first:], *prompts[:first]] if self._folder else ():
            if not _is_whole(self._file(self._key(prompt))):
                self._store(prompt)

    def _row(self, key: str, prompt: Prompt) -> Row:
        if key not in self._rows:
            self._rows[key] = self._read(key) or self._store(prompt)
            self._held += self._rows[key].size
        self._rows.move_to_end(key)
        while self._held > self._keep and len(self._rows) > 1:
            self._held -= self._rows.popitem(last=False)[1].size
        return self._rows[key].row()

    def _store(self, prompt: Prompt) -> "_Unpadded":
        row = _Unpadded.of(self._compute(prompt))
        if self._folder is None:
            return row
        key = self._key(prompt)
        file, aside = self._file(key), self._folder / f".partial-{uuid.uuid4().hex}"
        with explain_os_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                lengths = {name: str(length) for name, length in row.lengths.items()}
                save_file(dict(row.tensors), aside, metadata=lengths)
                os.replace(aside, file)
            finally:
                with contextlib.suppress(OSError):
                    aside.unlink(missing_ok=True)
        return row

    def _read(self, key: str) -> "_Unpadded | None":
        if self._folder is None:
            return None
        try:
            with safe_open(self._file(key), framework="pt") as file:
                lengths = {name: int(length) for name, length in file.metadata().items()}
                return _Unpadded({name: file.get_tensor(name) for name in lengths}, lengths)
        except (OSError, SafetensorError, AttributeError, ValueError):  # not there, or damaged: made anew
            return None

    def _key(self, prompt: Prompt) -> str:
        digest = hashlib.sha256(prompt.text.encode())
        for image in (prompt.columns.get(name) for name in self._images):
            if image is not None:
                digest.update(image_bytes(image))
        return digest.hexdigest()

    def _clear_leftovers(self) -> None:
        """Remove what processes that were killed while they wrote have left, long enough ago to be sure."""
        for leftover in self._folder.glob(".partial-*") if self._folder else ():
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > 24 * 3600:
                    leftover.unlink()

    def _file(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key}.safetensors"


@dataclass(frozen=True)
class _Unpadded:
    """A row without the zeros at the end of L in (1, L, ...), which most of a text's places are."""

    tensors: Mapping[str, Tensor]
    lengths: Mapping[str, int]

    @classmethod
    def of(cls, row: Row) -> "_Unpadded":
        tensors = {name: _without_padding(tensor.detach().cpu()).contiguous() for name, tensor in row.items()}
        return cls(tensors, {name: tensor.shape[1] for name, tensor in row.items()})

    @property
    def size(self) -> int:
        """Bytes of the tensors as they are held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def row(self) -> Row:
        """Return the row with its zeros."""
        return {name: _padded(tensor, self.lengths[name]) for name, tensor in self.tensors.items()}


def _is_whole(file: Path) -> bool:
    """Return whether an entry is there; the header of a safetensors file tells how long it has to be."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _without_padding(tensor: Tensor) -> Tensor:
    """Return a row (1, L, ...) without the zeros at the end of L, which most of a text's places are."""
    used = tensor[0].flatten(1).any(dim=1) if tensor.ndim > 2 else tensor[0] != 0
    places = used.nonzero().flatten()
    return tensor[:, : int(places[-1]) + 1 if len(places) else 0]


def _padded(tensor: Tensor, length: int) -> Tensor:
    padding = torch.zeros(1, length - tensor.shape[1], *tensor.shape[2:], dtype=tensor.dtype)
    return torch.cat([tensor, padding], dim=1)
