"""Save and resume everything that determines the rest of a run.

A checkpoint is a folder `checkpoints/000040` with one safetensors file per kind of tensor and `state.json`, which also
holds each file's SHA-256: it is written last, and a checkpoint that was cut short or changed is recognised. Nothing is
ever unpickled.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from flashgrpo.errors import UserError
from flashgrpo.files import remove, write_aside

FORMAT = 1
Tensors = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Progress:
    """Where a run stands, besides its tensors.

    Args:
        update: updates done.
        best_update: the update of the best held-out reward so far; 0 is the base model.
        stale: evaluations since then.
    """

    update: int = 0
    best_update: int = 0
    stale: int = 0


def save(folder: Path, tensors: Tensors, progress: Progress, keep: int) -> Path:
    """Write `folder/UPDATE` whole or not at all, then delete old ones: all but the newest `keep` and the best.

    Raises:
        UserError: the disk is full or not writable; older checkpoints are untouched.
    """
    path = _path(folder, progress.update)
    with write_aside(path) as aside:
        aside.mkdir()
        for name, named in tensors.items():
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in named.items()}
            safetensors.torch.save_file(contiguous, aside / f"{name}.safetensors")
        digests = {file.name: _digest(file) for file in sorted(aside.iterdir())}
        state = {"format": FORMAT, "files": digests, "progress": asdict(progress)}
        (aside / "state.json").write_text(json.dumps({**state, "digest": _digest_of(state)}, indent=2) + "\n")
    saved = updates(folder)
    earlier = [update for update in saved if update <= progress.update]  # a later one was damaged, and passed over
    for update in set(saved) - {*earlier[-keep:], progress.best_update}:
        remove(_path(folder, update))
    return path


def load_newest(folder: Path, warn: Callable[[str], None]) -> tuple[dict[str, dict[str, Tensor]], Progress] | None:
    """The newest checkpoint that is whole, or None where there is none; `warn` gets a sentence for each passed over.

    Raises:
        UserError: there are checkpoints and none is whole.
    """
    saved = updates(folder)
    for update in reversed(saved):
        try:
            return load(folder, update)
        except UserError as error:
            warn(f"{error}; trying the one before")
    if saved:
        raise UserError(f"no checkpoint in {folder} is whole; remove the folder of the run to start over")
    return None


def load_best(
    folder: Path, update: int | None, warn: Callable[[str], None]
) -> tuple[dict[str, dict[str, Tensor]], Progress]:
    """The checkpoint of `update`; without one, of the best held-out reward, or the newest where none beat the base.

    Raises:
        UserError: there is none, or it is damaged.
    """
    saved = updates(folder)
    if update is None:
        newest = load_newest(folder, warn)
        if newest is None:
            raise UserError(f"{folder.parent} has no checkpoint yet")
        best = newest[1].best_update
        return load(folder, best) if best in saved else newest
    if update not in saved:
        raise UserError(f"{folder.parent} has no checkpoint of update {update}; there are {', '.join(map(str, saved))}")
    return load(folder, update)


def load(folder: Path, update: int) -> tuple[dict[str, dict[str, Tensor]], Progress]:
    """Read `folder/UPDATE`, after its files have been checked against their digests.

    Raises:
        UserError: it is missing, cut short, changed, or of another format.
    """
    path = _path(folder, update)
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        if state["format"] != FORMAT:
            raise UserError(f"checkpoint {path} has format {state['format']}; this version reads {FORMAT}")
        if state.pop("digest") != _digest_of(state) or state["progress"]["update"] != update:
            raise UserError(f"checkpoint {path} is damaged: state.json has changed since it was written")
        for name, digest in state["files"].items():
            if _digest(path / name) != digest:
                raise UserError(f"checkpoint {path} is damaged: {name} has changed since it was written")
        tensors = {Path(name).stem: safetensors.torch.load_file(path / name) for name in state["files"]}
        return tensors, Progress(**state["progress"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"checkpoint {path} is not whole") from error


def updates(folder: Path) -> list[int]:
    """The updates that have a checkpoint, rising."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit() and path.is_dir())


def _path(folder: Path, update: int) -> Path:
    return folder / f"{update:06d}"


def _digest_of(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
