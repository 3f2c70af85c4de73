"""A kind of checkpoint under the conformance tests."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from flashgrpo.models.settings import ModelConfig


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint: its pipeline, and how it is called."""

    build: Callable[[], Any]
    height: int = 32
    width: int = 48
    num_frames: int = 9
    takes_image: bool = False
    last_image: bool = False
    """Whether a prompt brings a last frame, too."""
    guidance_scale_2: float | None = None
    model: dict[str, Any] = field(default_factory=dict)
    """Further settings."""
    dynamic: bool = False
    """Whether its scheduler shifts by resolution."""
    call: Callable[[Any], dict[str, Any]] = lambda model: {}
    """Further keywords of the pipeline's call."""
    to_pipeline: Callable[[Any, Tensor], dict[str, Tensor]] = lambda model, x: {"latents": x}
    from_pipeline: Callable[[Any, Any], Tensor] = lambda model, made: made[0]
    """Latents of a sample as keywords of the pipeline's call, and as what it returns is in latents."""
    guided: bool = True
    """Whether a guidance scale has an effect."""
    linear: bool = True
    """Whether guidance goes straight from the negative prompt through the text."""
    unipc: bool = True
    """Whether its pipeline can call that scheduler: one hands over a list, which UniPC cannot divide by."""
    comfyui: bool = True
    """Whether adapters can be written in ComfyUI's style."""

    def images(self, folder: Path) -> dict[str, str]:
        """Columns of a prompt: the images in a folder."""
        last = {"last_image": str(folder / "last.png")} if self.last_image else {}
        return {"image": str(folder / "first.png"), **last} if self.takes_image else {}

    @property
    def guidance(self) -> dict[str, Any]:
        """Settings of a rollout: two scales for two experts, 1 where the model has none."""
        second = {"guidance_scale_2": self.guidance_scale_2} if self.guidance_scale_2 else {}
        return second if self.guided else {"guidance_scale": 1}

    def config(self, folder: Path, **settings: Any) -> ModelConfig:
        """Settings of the model saved in `folder`."""
        size = {"height": self.height, "width": self.width, "num_frames": self.num_frames, "max_sequence_length": 12}
        train = {"kind": "lora", "rank": 2, "alpha": 4}
        return ModelConfig.model_validate({"path": str(folder), **size, "train": train, **self.model, **settings})

    def open(self, folder: Path) -> Any:
        """The pipeline of diffusers itself, as its users load it."""
        name = "WanImageToVideoPipeline" if "from_image" in self.model else self.build().__class__.__name__
        pipeline = getattr(diffusers, name).from_pretrained(folder, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
