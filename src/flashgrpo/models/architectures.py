"""Sizes of networks without their weights: read from a checkpoint's folder, or known by the checkpoint's name.

They tell how a video lies in latents before anything large is loaded, and let a network of the full size be built with
random weights, so that shapes, memory and speed can be measured without a download.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashgrpo.errors import UserError
from flashgrpo.models.settings import ModelConfig

FAMILIES = ("WanPipeline", "WanImageToVideoPipeline", "LTXPipeline")
BUILT = ("transformer", "transformer_2", "vae", "scheduler")
"""Components that are built from their settings; the encoders are not."""


@dataclass(frozen=True)
class Architecture:
    """A pipeline's class, and class and settings of each component that has some.

    Example: `Architecture("LTXPipeline", {"transformer": ("LTXVideoTransformer3DModel", {"num_layers": 28}), ...})`
    """

    family: str
    components: Mapping[str, tuple[str, Mapping[str, Any]]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the pipeline itself: where its two experts meet, for instance."""

    def of(self, component: str) -> Mapping[str, Any]:
        """Return the settings of a component."""
        return self.components[component][1]

    def has(self, component: str) -> bool:
        """Return whether there is such a component."""
        return component in self.components

    @classmethod
    def of_folder(cls, folder: Path) -> "Architecture":
        """Read a pipeline's folder.

        Raises:
            UserError: the folder is no diffusers pipeline of a supported family, or lacks a component.
        """
        index = folder / "model_index.json"
        if not index.is_file():
            raise UserError(f"model.path: {folder} is no diffusers pipeline, for it has no model_index.json")
        content = read_settings(index)
        family = content.get("_class_name")
        if not isinstance(family, str):
            raise UserError(f"model.path: {index} is no readable model_index.json")
        if family not in FAMILIES:
            raise UserError(
                f"model.path: {folder} is a {family}, which is not supported; supported are {', '.join(FAMILIES)}"
            )
        components = {}
        for name in BUILT:
            entry: Any = content.get(name)
            if is_component(entry) and all(entry):
                kind = entry[1]
                file = "scheduler_config.json" if name == "scheduler" else "config.json"
                components[name] = (str(kind), read_settings(folder / name / file))
        settings = {key: value for key, value in content.items() if not key.startswith("_") and not is_component(value)}
        needed = {"transformer", "vae", "scheduler"}
        needed |= {"transformer_2"} if settings.get("boundary_ratio") is not None else set()
        if missing := sorted(needed - set(components)):
            raise UserError(f"model.path: {folder} has no {missing[0]}, which a {family} with its settings needs")
        if components["transformer"][1].get("pos_embed_seq_len") is not None:
            raise UserError(f"model.path: {folder} goes from a first frame to a last one, which is not supported")
        return cls(family, components, settings)

    def build(self, names: Sequence[str], dtypes: Mapping[str, torch.dtype], empty: bool = False) -> dict[str, Any]:
        """Build components with random weights, the same at every call; `empty` ones have none, on the meta device."""
        import diffusers
        from accelerate import init_empty_weights

        parts: dict[str, Any] = {}
        for name in names:
            if not self.has(name):
                continue
            kind, settings = self.components[name]
            with init_empty_weights(include_buffers=False):
                part = getattr(diffusers, kind).from_config(dict(settings))
            if isinstance(part, nn.Module):
                fill(part, dtypes.get(name, dtypes["default"]), empty)
            parts[name] = part
        return parts


def checked_size(config: ModelConfig, multiple: int, stride: int) -> int:
    """Return the frames of latents that a video of the configured size has.

    Args:
        multiple: pixels of a side that one token stands for.
        stride: frames that one frame of latents stands for; the first has one of its own.

    Raises:
        UserError: the size does not fit; the sentence names the nearest that does.
    """
    for name, size in (("height", config.height), ("width", config.width)):
        if size % multiple:
            nearest = max(multiple, round(size / multiple) * multiple)
            raise UserError(f"model.{name}: {size} is no multiple of {multiple}; the nearest is {nearest}")
    if (config.num_frames - 1) % stride:
        nearest = round((config.num_frames - 1) / stride) * stride + 1
        raise UserError(
            f"model.num_frames: {config.num_frames} is no multiple of {stride} plus 1; the nearest is {nearest}"
        )
    return (config.num_frames - 1) // stride + 1


@torch.no_grad()
def fill(module: nn.Module, dtype: torch.dtype, empty: bool) -> None:
    """Give a module that was built without memory small random weights; norms become the identity."""
    if empty:
        module.to("meta")
    source = torch.Generator().manual_seed(0)
    precise = getattr(module, "_keep_in_fp32_modules", None) or ()
    for name, parameter in list(module.named_parameters()):
        owner = module.get_submodule(name.rpartition(".")[0])
        kind = torch.float32 if any(part in name.split(".") for part in precise) else dtype
        values = torch.empty(parameter.shape, dtype=kind, device="meta" if empty else "cpu")
        if empty:
            pass
        elif parameter.ndim > 1:
            values.normal_(std=0.02, generator=source)
        else:
            values.fill_(0.0 if name.endswith("bias") else 1.0)
        setattr(owner, name.rpartition(".")[2], nn.Parameter(values))


def read_settings(file: Path) -> dict[str, Any]:
    """Read a component's settings, a mapping in a JSON file.

    Raises:
        UserError: they cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {file} is no readable {file.name}") from error
    if not isinstance(content, dict):
        raise UserError(f"model.path: {file} is no readable {file.name}")
    return content


def is_component(value: Any) -> bool:
    """Return whether an entry of model_index.json names a component: [library, class]."""
    return isinstance(value, list) and len(value) == 2


def _wan(
    family: str,
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any] | None = None,
    experts: int = 1,
    shift: float = 3.0,
    **settings: Any,
) -> Architecture:
    shared = {"patch_size": (1, 2, 2), "attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256}
    network = ("WanTransformer3DModel", {**shared, **transformer})
    scheduler = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    names = ("transformer", "transformer_2")[:experts]
    components: dict[str, tuple[str, Mapping[str, Any]]] = dict.fromkeys(names, network)
    components["vae"] = ("AutoencoderKLWan", vae or {})
    components["scheduler"] = ("UniPCMultistepScheduler", scheduler)
    return Architecture(family, components, settings)


_WAN_1B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "in_channels": 16, "out_channels": 16}
_WAN_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "in_channels": 16, "out_channels": 16}
_WAN_14B_IMAGE = _WAN_14B | {"in_channels": 36}
_WAN_14B_CLIP = _WAN_14B_IMAGE | {"image_dim": 1280, "added_kv_proj_dim": 5120}
_WAN_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
_WAN22_VAE = {
    "z_dim": 48,
    "base_dim": 160,
    "decoder_base_dim": 256,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
_LTX_SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
_LTX = {"in_channels": 128, "out_channels": 128, "num_attention_heads": 32, "num_layers": 28, "caption_channels": 4096}

KNOWN: Mapping[str, Architecture] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan("WanPipeline", _WAN_1B),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan("WanPipeline", _WAN_14B),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _wan("WanImageToVideoPipeline", _WAN_14B_CLIP),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _wan("WanImageToVideoPipeline", _WAN_14B_CLIP, shift=5.0),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _wan("WanPipeline", _WAN_5B, _WAN22_VAE, shift=5.0, expand_timesteps=True),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _wan("WanPipeline", _WAN_14B, experts=2, boundary_ratio=0.875),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": _wan(
        "WanImageToVideoPipeline", _WAN_14B_IMAGE, experts=2, shift=5.0, boundary_ratio=0.9
    ),
    "Lightricks/LTX-Video": Architecture(
        "LTXPipeline",
        {
            "transformer": ("LTXVideoTransformer3DModel", _LTX),
            "vae": ("AutoencoderKLLTXVideo", {}),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", _LTX_SCHEDULER),
        },
    ),
}
"""By hub id; the sizes are those of the checkpoints' published configurations."""
