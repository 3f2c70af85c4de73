"""A streaming generator in one file, as Self-Forcing and its relatives publish it, beside a Wan folder for the rest."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from flashgrpo.errors import UserError, first_line
from flashgrpo.models.architectures import Architecture
from flashgrpo.models.settings import ModelConfig
from flashgrpo.models.source import Source
from flashgrpo.models.weights import load_tensors

GENERATORS = ("generator_ema", "generator")
"""Where the file has its weights; the average goes before the last."""
PREFIX = "model."


def read_generator(file: Path) -> dict[str, Tensor]:
    """Read the generator of a training checkpoint, with the names that diffusers has for them.

    Nothing of the file is run: it may hold tensors only (`weights_only`).

    Raises:
        UserError: no such file, not such a file, or no generator in it.
    """
    if not file.is_file():
        raise UserError(f"the streaming generator: there is no file {file}")
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of zip files, of pickles and of what must not be in them: all mean this
        raise UserError(f"the streaming generator: {file} holds no tensors alone: {first_line(error)[:200]}") from error
    found = [content[name] for name in GENERATORS if name in content] if isinstance(content, dict) else []
    if not found:
        raise UserError(f"the streaming generator: {file} has neither {' nor '.join(GENERATORS)} in it")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in found[0].items()}
    converted: dict[str, Tensor] = convert_wan_transformer_to_diffusers(tensors)
    return converted


class GeneratorSource(Source):
    """A Wan folder whose transformer comes from a generator's file.

    Raises:
        UserError: as `read_generator`; or its weights are not those of the folder's transformer.
    """

    def __init__(self, architecture: Architecture, folder: Path, config: ModelConfig, file: Path) -> None:
        self.file = file
        super().__init__(architecture, folder, config)

    def _network(self, name: str) -> Any:
        if name != "transformer":
            return super()._network(name)
        with init_empty_weights(include_buffers=False):
            network: Any = WanTransformer3DModel.from_config(dict(self.architecture.of(name)))
        dtype = self._dtypes()["default"]
        precise = network._keep_in_fp32_modules
        tensors = {
            key: tensor.to(torch.float32 if any(part in key.split(".") for part in precise) else dtype)
            for key, tensor in read_generator(self.file).items()
        }
        load_tensors(network, tensors, f"the streaming generator: {self.file}")
        return network
