"""Video models: one file per family. `load_model` reads which family a checkpoint is of."""

import json
from pathlib import Path

from flashgrpo.config import ModelConfig
from flashgrpo.distributed import Team
from flashgrpo.errors import UserError
from flashgrpo.recipe import resolve_path
from flashgrpo.types import VideoModel

FAMILIES = ("WanPipeline",)


def load_model(config: ModelConfig, team: Team, seed: int, keep_reference: bool = False) -> VideoModel:
    """Load the pipeline at `config.path` and prepare its network for training as `config.train` says.

    Args:
        team: the processes that the network is placed on.
        seed: of the adapters' initial weights.
        keep_reference: keep a copy of the base weights for `reference()` where adapters cannot be switched off.

    Raises:
        UserError: no such folder, no pipeline, an unsupported family, or a video size that the model cannot take.
    """
    path = resolve_path(config.path)
    family = _family(path)
    if family == "WanPipeline":
        from flashgrpo.models.wan import WanModel  # loads diffusers' models, which takes seconds

        return WanModel.load(path, config, team, seed, keep_reference)
    raise UserError(f"model.path: {path} is a {family}, which is not supported; supported are {', '.join(FAMILIES)}")


def _family(path: str) -> str:
    """The pipeline class that a folder or a hub repository names."""
    if Path(path).is_dir():
        index = Path(path) / "model_index.json"
        if not index.is_file():
            raise UserError(f"model.path: {path} is no diffusers pipeline, for it has no model_index.json")
    elif path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"model.path: there is no folder {path}")
    else:
        index = _fetch_index(path)
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"model.path: {index} is no readable model_index.json") from error


def _fetch_index(repository: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, "model_index.json"))
    except Exception as error:  # the hub's client raises a dozen kinds, and all mean this
        raise UserError(
            f"model.path: {repository} is no folder here and could not be had from the hub ({type(error).__name__})"
        ) from error
