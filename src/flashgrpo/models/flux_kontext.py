"""FLUX.1 Kontext, image and text to image: the prompt's picture stands beside what is made, as further tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flashgrpo.models.conditions import Row
from flashgrpo.models.flux import FluxModel
from flashgrpo.models.image import Plane, pack, places, unpack
from flashgrpo.process import PipelineCall
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.types import Condition


class FluxKontextModel(FluxModel):
    """A `FluxKontextPipeline` as a `VideoModel` of one frame; the picture has the size of what is made."""

    takes_image = True
    keeps_spacing = False
    cached_parts = (*FluxModel.cached_parts, "vae")

    def encode_image(self, image: Any) -> Row:
        """Return {"reference": (1, C, H, W)}, the picture's latents."""
        config = self.config
        vae: Any = self.part("vae")
        pixels = self.pipeline.image_processor.preprocess(self.fitted(image), config.height, config.width)
        latents = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode().float()
        return {"reference": (latents - vae.config.shift_factor) * vae.config.scaling_factor}

    def nothing(self) -> Condition:
        """Return the negative prompt, and zeros for a picture."""
        channels, _, height, width = self.latent_shape
        zeros = torch.zeros(1, channels, height, width, device=self.device)
        return Condition({**super().nothing().tensors, "reference": zeros})

    def predict(self, network: nn.Module, x: Plane, point: GridPoint, condition: Condition) -> Plane:
        """Call the transformer as the pipeline does: the picture's tokens stand at the same places, one level on."""
        height, width = x.shape[-2:]
        levels = places(2, height // 2, width // 2, device=x.device)
        tokens = torch.cat([pack(x), pack(condition.tensors["reference"].to(x))], dim=1)
        v = self.predict_tokens(network, tokens, levels, point, condition)
        return unpack(v[:, : tokens.shape[1] // 2], height, width)

    def pipeline_call(self, given: Mapping[str, Any]) -> PipelineCall:
        """Return the size as it is for what is made and for the picture, not the nearest of a million pixels."""
        area = self.config.height * self.config.width
        return super().pipeline_call({**given, "max_area": area, "_auto_resize": False})
