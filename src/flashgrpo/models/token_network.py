"""What models of tokens have in common: a network of transformers or diffusers that is trained, and its base."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError
from flashgrpo.files import resolve_path, write_json
from flashgrpo.models.lora import at_start, starting_weights, trained_parameters
from flashgrpo.models.network import prepare_network
from flashgrpo.models.settings import ModelConfig
from flashgrpo.models.warm_start import WarmStart, adapter_files, read_adapters
from flashgrpo.processes.tokens.model import Read, Tokens
from flashgrpo.settings import DEFAULT_ADAPTERS
from flashgrpo.types import Condition, LoraStyle, Prompt


class TransformerModel(ABC):
    """A network of transformers or diffusers, made ready to be trained: most of a `Model`.

    Attributes:
        decoder: what makes media of tokens; empty where nothing does.

    Args:
        network: loaded, on the CPU or the meta device.
        keep_reference: keep a copy of the base weights where adapters cannot be switched off.
        adapters: names of the sets of adapters that are trained.

    Raises:
        UserError: a setting has no effect here, or `config.train` fits nothing.
    """

    without: ClassVar[Sequence[str]] = ("compile", "attention", "offload", "negative_prompt", "from_image", "shift")
    """Settings of a model that these networks have no use for."""
    encodes_first: ClassVar[bool] = False
    """Whether prompts are encoded by a network of their own, before this one is loaded."""

    def __init__(
        self,
        network: Any,
        config: ModelConfig,
        world: World,
        seed: int,
        keep_reference: bool,
        adapters: Sequence[str] = (DEFAULT_ADAPTERS,),
    ) -> None:
        for name in self.without:
            if getattr(config, name) != ModelConfig.model_fields[name].default:
                raise UserError(f"model.{name}: {config.path} has no use for it; leave it out")
        self.config, self.device = config, world.device
        self.dtype: torch.dtype = getattr(torch, config.compute_dtype or config.dtype)
        self.adapters = tuple(adapters)
        starts = read_sets(config, self.adapters, network, self._published_layer)
        prepare_network(network, config, world, seed, starts=starts, adapters=self.adapters)
        self.network: Any = network if world.uses_fsdp else network.to(world.device)
        self.decoder: nn.Module = nn.Module()
        self._start = starting_weights(network, config, keep_reference)

    @property
    def recomputes(self) -> bool:
        """Whether a backward pass computes the blocks again."""
        return self.config.gradient_checkpointing

    def reference(self) -> AbstractContextManager[None]:
        """Compute with the model that training began with inside this context."""
        return at_start(self.network, [self.network], self._start)

    def decoding_bytes(self, samples: int) -> int:
        """Count the bytes at the highest of decoding so many samples, of a model on the meta device."""
        return 0

    def published_name(self, module: str) -> str:
        """Return a module's name in the checkpoint's own class."""
        return module

    def _published_layer(self, name: str) -> str:
        """Return the published name of `LAYER.lora_A.weight`."""
        layer, dot, end = name.partition(".lora_")
        return f"{self.published_name(layer)}{dot}{end}"

    def save_lora(self, folder: Path, tensors: Mapping[str, Tensor], style: LoraStyle = "diffusers") -> list[str]:
        """Write adapters as peft loads them onto the checkpoint's own class; returns the names of the files.

        As peft does, those called `default` lie in the folder itself, and others in one of their name inside of it.

        Raises:
            UserError: ComfyUI has no such models.
        """
        if style == "comfyui":
            raise UserError("--format comfyui: it has no models of tokens; use diffusers or merged")
        files: list[str] = []
        for name in self.adapters:
            inside = Path() if name == DEFAULT_ADAPTERS else Path(name)
            write_peft(self.network, tensors, folder / inside, self.published_name, self.config.path, name)
            files += [str(inside / file) for file in ("adapter_model.safetensors", "adapter_config.json")]
        return files

    def save_merged(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the whole model with the trained parameters in it; it is of no further use afterwards.

        Raises:
            UserError: several sets of adapters cannot be in one set of weights.
        """
        if len(self.adapters) > 1:
            raise UserError(
                f"--format merged: the adapters {', '.join(self.adapters)} cannot be in one set of weights; take "
                "--format diffusers"
            )
        for name, parameter in trained_parameters(self.network).items():
            parameter.data.copy_(tensors[name])
        merge_adapters(self.network)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_whole(folder)

    @property
    @abstractmethod
    def identity(self) -> str:
        """Tells the base weights from others, wherever they lie."""

    @abstractmethod
    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Return what the network is conditioned on, a row for each prompt."""

    @abstractmethod
    def nothing(self) -> Condition:
        """Return the condition of an empty prompt, one row."""

    @abstractmethod
    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text before any are cut off."""

    @abstractmethod
    def _save_whole(self, folder: Path) -> None:
        """Write the network, and what belongs to it, as the checkpoint had them."""


class TokenNetwork(TransformerModel):
    """A network that predicts tokens from all others: most of a `TokenModel`."""

    length: int
    vocabulary: int
    mask: int | None
    end: int | None

    @abstractmethod
    def call(self, tokens: Tokens, condition: Condition, read: Read) -> Tensor:
        """Call the network; see `TokenModel`."""

    @abstractmethod
    def decode(self, tokens: Tokens, frames: int | None = None) -> Any:
        """Return media; see `TokenModel`."""


def read_sets(
    config: ModelConfig, adapters: Sequence[str], network: nn.Module, original_name: Callable[[str], str | None]
) -> dict[str, WarmStart]:
    """Read what each of several sets of adapters begins with; one file alone where it is merged.

    A set's own file lies in a folder of its name, as a run writes it; what has no such folder begins with the file that
    `model.adapters` names.
    """
    if config.adapters is None:
        return {}
    path, read = Path(resolve_path(config.adapters)), dict[Path, WarmStart]()
    folders = {name: path / name if (path / name).is_dir() else path for name in adapters}
    if config.merge_adapters:
        folders = {adapters[0]: path}
    for folder in dict.fromkeys(folders.values()):
        files = adapter_files(config.model_copy(update={"adapters": str(folder)}), ["network"])
        read[folder] = read_adapters(files["network"], network, original_name)
    return {name: read[folder] for name, folder in folders.items()}


def write_peft(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    folder: Path,
    published_name: Callable[[str], str],
    base: str,
    adapters: str = DEFAULT_ADAPTERS,
) -> None:
    """Write adapters of one name (name -> tensor of `network`) as `PeftModel.from_pretrained` reads them.

    Args:
        published_name: the name of a module in the class that they are to be loaded onto.
        base: the checkpoint that they were trained for.
    """
    from peft.utils import get_peft_model_state_dict

    own = {name: tensor for name, tensor in tensors.items() if name.endswith(f".{adapters}.weight")}
    layers = get_peft_model_state_dict(network, state_dict=own, adapter_name=adapters)
    named, modules = {}, set()
    for name, tensor in layers.items():
        module, _, rest = name.partition(".lora_")
        modules.add(published_name(module))
        named[f"base_model.model.{published_name(module)}.lora_{rest}"] = tensor.contiguous()
    settings = network.peft_config[adapters].to_dict()  # type: ignore[index,union-attr]
    settings |= {"target_modules": sorted(modules), "base_model_name_or_path": base, "inference_mode": True}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", {key: _plain(settings[key]) for key in sorted(settings)}, indent=2)


def _plain(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    return value if isinstance(value, bool | int | float | str | list | dict | None) else getattr(value, "value", None)


def merge_adapters(network: nn.Module) -> None:
    """Add adapters to the weights of their layers, and put the layers in their places."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, module.get_base_layer())
