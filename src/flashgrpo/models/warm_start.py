"""Adapters that a run begins with: a LoRA of any usual key style, which training goes on with or merges first."""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flashgrpo.errors import UserError, first_line
from flashgrpo.files import read_object, resolve_path
from flashgrpo.models.conditions import fingerprint
from flashgrpo.models.lora import left_out
from flashgrpo.models.settings import Lora, ModelConfig
from flashgrpo.settings import DEFAULT_ADAPTERS

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer_2.", "transformer.")
"""Before a layer's name, in which dots stand between modules."""
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
"""Before a layer's name in which underscores stand for the dots, too (kohya, musubi)."""
KEY = re.compile(
    r"(?P<layer>.+?)\.(?:(?P<down>lora_A(?:\.default)?|lora_down|lora\.down)\.weight"
    r"|(?P<up>lora_B(?:\.default)?|lora_up|lora\.up)\.weight|(?P<alpha>alpha)"
    r"|(?P<bias>diff_b|lora_B(?:\.default)?\.bias))"
)
NOISE = ("high", "low")
"""What the files of two experts have in their names."""
MERGE = "model.merge_adapters=true"


@dataclass(frozen=True)
class Adapter:
    """The low-rank change of a linear layer: `scale * up @ down` is added to its weight.

    Args:
        scale: alpha / rank of the file.
        bias: added to the layer's bias, as files of distilled models have it; None changes nothing.
    """

    down: Float[Tensor, "rank inputs"]
    up: Float[Tensor, "outputs rank"]
    scale: float
    bias: Float[Tensor, " outputs"] | None = None


@dataclass(frozen=True)
class WarmStart:
    """The adapters that a network begins with, by the names of its layers, and the file that they are from."""

    file: Path
    adapters: Mapping[str, Adapter]

    @property
    def rank(self) -> int:
        """The highest rank of a layer."""
        return max(len(adapter.down) for adapter in self.adapters.values())

    @torch.no_grad()
    def merge_into(self, network: nn.Module) -> None:
        """Add the adapters to the weights and biases of their layers, computed in float32."""
        for name, adapter in self.adapters.items():
            layer: Any = network.get_submodule(name)
            layer.weight.copy_(layer.weight.float() + adapter.scale * (adapter.up.float() @ adapter.down.float()))
            if adapter.bias is not None:
                layer.bias.copy_(layer.bias.float() + adapter.bias.float())

    @torch.no_grad()
    def continue_in(self, network: nn.Module, train: Lora, name: str = DEFAULT_ADAPTERS) -> None:
        """Give the adapters of this name that were put on a network these values, which leave the velocity what it was.

        Adapters of a higher rank begin with zeros in the further columns of B; where alpha / rank is another than the
        file's, B is scaled. Layers that the file lacks begin as the identity; those that the network computes and drops
        (`left_out`) are passed over, since what they give changes nothing.

        Raises:
            UserError: a layer has no adapter to hold its values, or one of a lower rank, or its bias changes.
        """
        passed = left_out(network)
        used = {layer: adapter for layer, adapter in self.adapters.items() if layer not in passed}
        if biased := [layer for layer, adapter in used.items() if adapter.bias is not None]:
            raise UserError(
                f"model.adapters: {self.file} changes biases, of {_some(map(_short, biased))}, which adapters that are "
                f"trained do not have; take {MERGE}"
            )
        without = [layer for layer in used if not hasattr(network.get_submodule(layer), "lora_A")]
        if without:
            raise UserError(
                f"model.adapters: {self.file} has adapters on {_some({_short(layer) for layer in without})}, which "
                f"model.train.targets leave out; add them, or take {MERGE}"
            )
        if self.rank > train.rank:
            raise UserError(
                f"model.adapters: {self.file} has rank {self.rank}, which model.train.rank {train.rank} has no room "
                f"for; take model.train.rank={self.rank} or more, or {MERGE}"
            )
        for layer, adapter in used.items():
            module: Any = network.get_submodule(layer)
            rank = len(adapter.down)
            module.lora_A[name].weight[:rank] = adapter.down.float()
            module.lora_B[name].weight[:, :rank] = adapter.up.float() * (adapter.scale / (train.alpha / train.rank))


def adapters_identity(config: ModelConfig) -> str:
    """Tells the adapters that a run begins with from others; empty without any."""
    if config.adapters is None:
        return ""
    path = Path(resolve_path(config.adapters))
    return fingerprint(path.parent, [path.name], {"merged": config.merge_adapters})


def adapter_files(config: ModelConfig, experts: Sequence[str]) -> dict[str, Path]:
    """Return the file for each expert; none where a run begins without adapters.

    Raises:
        UserError: there is no file, or not one for each expert.
    """
    if config.adapters is None:
        return {}
    path = Path(resolve_path(config.adapters))
    if not path.exists():
        raise UserError(f"model.adapters: there is no file or folder {path}")
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(experts) == 1:
        if len(files) != 1:
            raise UserError(f"model.adapters: {path} holds {len(files)} safetensors files and should hold one; name it")
        return {experts[0]: files[0]}
    found = {
        name: [file for file in files if word in file.name.lower()] for name, word in zip(experts, NOISE, strict=True)
    }
    if path.is_file() or any(len(own) != 1 for own in found.values()):
        raise UserError(
            f"model.adapters: this model has two experts, so {path} should be a folder with two safetensors files, "
            f"one with {NOISE[0]!r} and one with {NOISE[1]!r} in its name"
        )
    return {name: own for name, [own] in found.items()}


def read_adapters(
    file: Path,
    network: nn.Module,
    original_name: Callable[[str], str | None],
    convert: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> WarmStart:
    """Read a LoRA for the linear layers of a network.

    Layers go by the network's own names or by those of the released checkpoint, behind the prefix that diffusers (none
    or `transformer.`), peft (`base_model.model.`), or ComfyUI and ai-toolkit (`diffusion_model.`) write, or flattened
    as kohya and musubi write them (`lora_unet_`); their matrices are `lora_A`, `lora_B` or `lora_down`, `lora_up`.
    The factor alpha / rank comes from a layer's key `alpha`, from the header that diffusers writes, or from peft's
    adapter_config.json beside the file; without any it is 1. A bias may change by `diff_b` or `lora_B.bias`.

    Args:
        original_name: the name in the released checkpoint of `LAYER.lora_A.weight`; None where it has none.
        convert: makes diffusers' names of keys that fit no layer by themselves, where layers were fused.
        say: told what was found.

    Raises:
        UserError: the file is damaged, or holds something that fits no layer.
    """
    tensors, settings = _open(file)
    linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    known = _index(linear, original_name)
    # Differences of norms and biases that are all zero are in many files, and change nothing.
    changing = {key: tensor for key, tensor in tensors.items() if _is_matrix(key) or bool(tensor.any())}
    found, unknown = _sorted(changing, known)
    if unknown and convert is not None and all(map(KEY.fullmatch, changing)):
        with contextlib.suppress(ValueError, KeyError, AttributeError, RuntimeError, IndexError):  # said below
            found, unknown = _sorted(convert(changing), known)
    if unknown or not found:
        raise UserError(
            f"model.adapters: {file} has {len(unknown)} of {len(tensors)} keys that fit no linear layer of this "
            f"network: {_some(unknown) or 'it is empty'}; is it a LoRA for this model?"
        )
    adapters = {name: _adapter(file, name, parts, settings, linear[name]) for name, parts in found.items()}
    start, scales = WarmStart(file, adapters), sorted({adapter.scale for adapter in adapters.values()})
    scale = f"alpha / rank {scales[0]:.4g}" + (f" to {scales[-1]:.4g}" if len(scales) > 1 else "")
    say(f"beginning with the adapters of {file}: rank {start.rank}, {scale}, on {len(adapters)} layers")
    return start


def _open(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file, and the settings that diffusers or peft keep with them."""
    settings: dict[str, Any] = {}
    try:
        with safe_open(file, framework="pt") as content:
            tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118  (it is no mapping)
            if header := (content.metadata() or {}).get("lora_adapter_metadata"):
                settings = {key.rpartition("transformer.")[2]: value for key, value in json.loads(header).items()}
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise UserError(f"model.adapters: {file} cannot be read as safetensors: {first_line(error)[:200]}") from error
    beside = file.parent / "adapter_config.json"
    if not settings and file.name == "adapter_model.safetensors" and beside.is_file():
        settings = read_object(beside)
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"model.adapters: {file} has values that are not finite in {key}; get the file again")
    return tensors, settings


def _index(layers: Iterable[str], original_name: Callable[[str], str | None]) -> dict[str, str]:
    """Return every name that a file may have for a layer -> the layer."""
    known: dict[str, str] = {}
    for layer in layers:
        end = ".lora_A.weight"
        original = original_name(f"{layer}{end}")
        for name in (layer, original.removesuffix(end) if original else layer):
            known[name] = known[name.replace(".", "_")] = layer
    return known


def _sorted(tensors: Mapping[str, Tensor], known: Mapping[str, str]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return layer -> part (down, up, alpha) -> tensor, and the keys that fit none."""
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        layer = known.get(_bare(match["layer"])) if match else None
        if match is None or layer is None:
            unknown.append(key)
        else:
            found.setdefault(layer, {})[str(match.lastgroup)] = tensor
    return found, unknown


def _is_matrix(key: str) -> bool:
    match = KEY.fullmatch(key)
    return match is not None and match["bias"] is None


def _bare(layer: str) -> str:
    """Return a layer's name without the prefix of a file's style."""
    prefix = next((prefix for prefix in (*PREFIXES, *FLAT) if layer.startswith(prefix)), "")
    return layer.removeprefix(prefix)


def _adapter(
    file: Path, name: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any], layer: nn.Linear
) -> Adapter:
    """Put the parts of a layer together, as its weight wants them."""
    if not {"down", "up"} <= parts.keys():
        raise UserError(f"model.adapters: {file} has only one of the two matrices of {name}; get the file again")
    down, up = parts["down"], parts["up"]
    rank, shape = len(down), (layer.out_features, layer.in_features)
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != rank or (len(up), down.shape[1]) != shape:
        raise UserError(
            f"model.adapters: {file} has {list(up.shape)} x {list(down.shape)} for {name}, which is {list(shape)} "
            "here; it is for another model"
        )
    bias, own = parts.get("bias"), layer.bias
    if bias is not None and (own is None or bias.shape != own.shape):
        raise UserError(f"model.adapters: {file} has a bias for {name} that does not fit; it is for another model")
    return Adapter(down, up, _scale(name, parts, settings, rank), bias)


def _scale(name: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any], rank: int) -> float:
    """Return alpha / rank of a layer."""
    if "alpha" in parts:
        return float(parts["alpha"]) / rank
    if settings.get("lora_alpha") is None:
        return 1.0
    from peft.utils.other import get_pattern_key  # takes seconds to import

    special = settings.get("alpha_pattern") or {}
    alpha = special.get(get_pattern_key(list(special), name), settings["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _short(name: str) -> str:
    """Return a layer's name without that of its block."""
    return name.split(".", 2)[-1]


def _some(names: Iterable[str], shown: int = 3) -> str:
    """Name the first few, and say how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
