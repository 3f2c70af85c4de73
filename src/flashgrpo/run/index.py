"""Read DCP's index of a checkpoint: nothing else is unpickled, and all that it names has to be there."""

import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from flashgrpo.errors import UserError


class ShardReader(dcp.FileSystemReader):
    """DCP's reader, with its index (a pickle) read by an unpickler that knows the index's own types and nothing else.

    The tensors are read by DCP with `weights_only=True`.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            with (Path(self.path) / ".metadata").open("rb") as file:
                metadata = _IndexUnpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        except (OSError, EOFError, ValueError, AttributeError, ImportError, pickle.UnpicklingError) as error:
            raise UserError(f"checkpoint {self.path} is damaged: its index cannot be read ({error})") from error
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Builds the classes of DCP's metadata, sizes, dtypes and paths."""

    DCP = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")

    def find_class(self, module: str, name: str) -> Any:
        if module in self.DCP and name.isidentifier():
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ in self.DCP:
                return found
        if (module, name) == ("torch", "Size") or (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith("pathlib") and name in ("PosixPath", "Path", "PurePosixPath"):
            return pathlib.PurePosixPath
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


def check_shards(folder: Path) -> None:
    """Check that every piece of a tensor that DCP's index names is there.

    Raises:
        UserError: a shard is missing or too short.
    """
    needed: dict[str, int] = {}
    for piece in (ShardReader(folder).read_metadata().storage_data or {}).values():
        needed[piece.relative_path] = max(needed.get(piece.relative_path, 0), piece.offset + piece.length)
    for name, size in needed.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size < size:
            raise UserError(
                f"checkpoint {folder} is not whole: {name} is missing or too short; "
                "do all machines see the same run directory?"
            )
