"""Models of tokens: one file per family. `load_token_model` reads which family a checkpoint is of."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError, first_line, shorten
from flashgrpo.files import resolve_path
from flashgrpo.models.load import META, Say
from flashgrpo.models.settings import ModelConfig
from flashgrpo.models.token_network import TokenNetwork
from flashgrpo.types import Prompt

FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*/scheduler_model.pth")
"""Of a repository on the hub; its code is not among them."""


def load_token_model(
    config: ModelConfig,
    world: World,
    seed: int,
    prompts: Sequence[Prompt] = (),
    keep_reference: bool = False,
    say: Say | None = None,
) -> TokenNetwork:
    """Load a model of tokens and prepare its network for training as `config.train` says; see `load_model`.

    Raises:
        UserError: no such folder, no model of a supported family, or a size that it cannot take.
    """
    config.check_no_generator()
    if world.context > 1:
        raise UserError("parallel.context: a sample's tokens are too few to be split; leave it out")
    path = resolve_path(config.path)
    settings = _known(path) if config.random_init else None
    folder = None
    if settings is None:
        folder = find_folder(path, config.random_init)
        settings = _read(folder, config.path)
    given = settings, None if config.random_init else folder, config, world, seed, keep_reference
    model = _class_of(settings)
    return model(*given, prompts) if model.encodes_first else model(*given)


def _known(path: str) -> Any:
    """Return the settings of a checkpoint that is known by its name on the hub; None of any other."""
    from flashgrpo.models import amused, llada_network  # these load transformers' and diffusers' models: seconds
    from flashgrpo.models.ursa import checkpoint as ursa

    if path in llada_network.KNOWN:
        return llada_network.Sizes(path, llada_network.KNOWN[path])
    return amused.KNOWN.get(path) or ursa.KNOWN.get(path)


def _read(folder: Path, where: str) -> Any:
    """Read the settings of a folder of any family."""
    from flashgrpo.models import amused, llada_network
    from flashgrpo.models.ursa.checkpoint import Ursa

    if _setting(folder / "config.json", "model_type") == "llada":
        return llada_network.read_sizes(folder)
    family = _setting(folder / "model_index.json", "_class_name")
    if family == "AmusedPipeline":
        return amused.read_parts(folder)
    if family == "URSAPipeline":
        return Ursa.of_folder(folder)
    raise UserError(f"model.path: {where} is no model of tokens; the checkpoints of LLaDA, aMUSEd and URSA are")


def _class_of(settings: Any) -> Any:
    """Return the class of a model by that of its settings."""
    from flashgrpo.models.amused import AmusedModel, Parts
    from flashgrpo.models.llada import LladaModel
    from flashgrpo.models.llada_network import Sizes
    from flashgrpo.models.ursa.checkpoint import Ursa
    from flashgrpo.models.ursa.model import UrsaModel

    classes: dict[type, Any] = {Sizes: LladaModel, Parts: AmusedModel, Ursa: UrsaModel}
    return classes[type(settings)]


def weightless_token_model(config: ModelConfig, keep_reference: bool = False) -> TokenNetwork:
    """Build the model in its full size on the meta device."""
    return load_token_model(config.weightless(), World(META), seed=0, keep_reference=keep_reference)


def _setting(file: Path, name: str) -> Any:
    """Return a setting of a JSON file, None where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get(name) if isinstance(content, dict) else None


def find_folder(path: str, random_init: bool) -> Path:
    """Return a checkpoint's folder, downloaded where it is a name on the hub."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"model.path: there is no folder {path}")
    if random_init:
        raise UserError(f"model.path: the sizes of {path} are not known; give its folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(FILES)))
    except Exception as error:  # the hub's client raises a dozen kinds, and all mean this
        raise UserError(
            f"model.path: {path} is no folder here and could not be had from the hub; without one, give the "
            f"folder of a checkpoint: {shorten(first_line(error), 200)}"
        ) from error
