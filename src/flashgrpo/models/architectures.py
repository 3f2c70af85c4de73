"""Sizes of networks without their weights: read from a checkpoint's folder, or known by the checkpoint's name.

They tell how a video lies in latents before anything large is loaded, and let a network of the full size be built with
random weights, so that shapes, memory and speed can be measured without a download.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from flashgrpo.errors import UserError
from flashgrpo.models.families import FAMILIES, STREAMING, guidance_kind, refusal
from flashgrpo.models.settings import ModelConfig
from flashgrpo.processes.flow.choices import GuidanceKind

BUILT = ("transformer", "transformer_2", "vae", "audio_vae", "vocoder", "scheduler", "guider")
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

    @property
    def guidance(self) -> GuidanceKind:
        """What a guidance scale above 1 does."""
        guider = self.of("guider") if self.has("guider") else {}
        return guidance_kind(self.family, self.of("transformer"), {**self.settings, **guider})

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
        if family not in (*FAMILIES, *STREAMING):
            raise UserError(f"model.path: {folder} is a {refusal(family)}")
        components = {}
        for name in BUILT:
            entry: Any = content.get(name)
            if is_component(entry) and all(entry):
                kind = entry[1]
                file = f"{name}_config.json" if name in ("scheduler", "guider") else "config.json"
                components[name] = (str(kind), read_settings(folder / name / file))
        settings = {key: value for key, value in content.items() if not key.startswith("_") and not is_component(value)}
        needed = {"transformer", "vae", "scheduler"}
        needed |= {"transformer_2"} if settings.get("boundary_ratio") is not None else set()
        if missing := sorted(needed - set(components)):
            raise UserError(f"model.path: {folder} has no {missing[0]}, which a {family} with its settings needs")
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
                found = getattr(diffusers, kind, None) or getattr(package_of(self.family), kind)
                part = found.from_config(dict(settings))
            if isinstance(part, nn.Module):
                fill(part, dtypes.get(name, dtypes["default"]), empty)
            parts[name] = part
        return parts


def package_of(family: str) -> ModuleType:
    """Return the package of a pipeline in diffusers, where networks are that no other pipeline has."""
    import diffusers

    return import_module(getattr(diffusers, family).__module__.rpartition(".")[0])


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
