"""Flow models: one file per family. `load_model` reads which family a checkpoint is of."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError, first_line, shorten
from flashgrpo.files import resolve_path
from flashgrpo.models.architectures import Architecture
from flashgrpo.models.families import FAMILIES, STREAMING
from flashgrpo.models.known import KNOWN
from flashgrpo.models.settings import ModelConfig
from flashgrpo.processes.flow.choices import branches_of
from flashgrpo.processes.flow.model import VideoModel
from flashgrpo.types import Prompt

META = torch.device("meta")
Say = Callable[[str], None]
"""Told what takes long."""


def load_model(
    config: ModelConfig,
    world: World,
    seed: int,
    prompts: Sequence[Prompt] = (),
    keep_reference: bool = False,
    say: Say | None = None,
) -> VideoModel:
    """Load the pipeline at `config.path` and prepare its network for training as `config.train` says.

    Args:
        world: the processes that the network is placed on; all of them call this together.
        seed: of the adapters' initial weights.
        prompts: those that will be asked for; they are encoded before the network is loaded.
        keep_reference: keep a copy of the base weights for `reference()` where adapters cannot be switched off.
        say: told what takes long.

    Raises:
        UserError: no such folder, no pipeline, an unsupported family, or a video size that the model cannot take.
    """
    config.check_no_generator()
    if config.vae_dtype == "auto":
        config = config.model_copy(update={"vae_dtype": fast_dtype(world.device)})
    architecture, folder = find_architecture(config)
    if architecture.family in STREAMING:
        raise UserError(
            f"model.path: {config.path} draws a video block by block; take an algorithm for that, such as kvpo"
        )
    if config.from_image and architecture.family != "WanImageToVideoPipeline":
        if not architecture.settings.get("expand_timesteps"):
            raise UserError(f"model.from_image: {config.path} makes videos from text only; leave it out")
        architecture = replace(architecture, family="WanImageToVideoPipeline")
    if config.negative_prompt and architecture.guidance != "classifier-free":
        raise UserError(f"model.negative_prompt: {config.path} has no branch that it would steer; leave it out")
    from flashgrpo.models.source import Source  # loads diffusers' models, which takes seconds

    source = Source(architecture, None if config.random_init else folder, config, empty=world.device.type == "meta")
    family = FAMILIES[architecture.family]
    module = importlib.import_module(f"flashgrpo.models.{family.module}")
    model: VideoModel = getattr(module, family.model)(source, config, world, seed, prompts, keep_reference, say)
    return model


def fast_dtype(device: torch.device) -> str:
    """`bfloat16` where the device multiplies it (GPUs since Ampere, CPUs with AMX or AVX512-BF16), else `float32`.

    Without such units it is slow: 20 times slower than float32 for the bundled autoencoder on a CPU with AVX2 alone.
    """
    if device.type == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return "bfloat16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "float32"
    return "bfloat16" if device.type == "meta" or torch.cuda.is_bf16_supported(False) else "float32"


def find_architecture(config: ModelConfig) -> tuple[Architecture, Path]:
    """Find class and sizes of the pipeline at `config.path`, and its folder, which random weights do without.

    Raises:
        UserError: no such folder, no pipeline, or an unsupported family.
    """
    path = resolve_path(config.path)
    folder = Path(path)
    if config.random_init and path in KNOWN:
        return KNOWN[path], folder
    if not folder.is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise UserError(f"model.path: there is no folder {path}")
        if config.random_init:
            raise UserError(f"model.path: the sizes of {path} are not known; known are {', '.join(KNOWN)}")
        folder = _download(path)
    return Architecture.of_folder(folder), folder


def branches(config: ModelConfig) -> int:
    """Return how many branches a call with guidance has; 2, the most, of a hub's checkpoint that is not known."""
    path = resolve_path(config.path)
    found = KNOWN.get(path) or (Architecture.of_folder(Path(path)) if Path(path).is_dir() else None)
    return branches_of(found.guidance) if found else 2


def _download(repository: str) -> Path:
    """Download a hub's pipeline and return its folder; what is on this machine already is not fetched again."""
    import diffusers
    from diffusers import DiffusionPipeline

    diffusers.utils.logging.set_verbosity_error()  # what goes wrong is said below, once
    try:
        return Path(DiffusionPipeline.download(repository))
    except Exception as error:  # the hub's client raises a dozen kinds, and all mean this
        raise UserError(
            f"model.path: {repository} is no folder here and could not be had from the hub; without one, give the "
            f"folder of a checkpoint: {shorten(first_line(error), 200)}"
        ) from error


def weightless(model: ModelConfig) -> Any:
    """Build the model in its full size on the meta device."""
    return load_model(model.weightless(), World(META), seed=0)
