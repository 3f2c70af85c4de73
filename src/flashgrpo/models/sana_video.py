"""Sana-Video, text to video: linear attention on the latents of Wan's autoencoder, and the texts of Sana."""

import torch
from torch import nn

from flashgrpo.errors import UserError
from flashgrpo.models.architectures import checked_size
from flashgrpo.models.pipeline import Size
from flashgrpo.models.sana import SanaTexts
from flashgrpo.models.wan_latents import WanLatents
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.types import Condition, Latents

MULTIPLE = 32  # pixels of a side, to which the pipeline holds itself whatever the autoencoder


class SanaVideoModel(SanaTexts, WanLatents):
    """A `SanaVideoPipeline` as a `VideoModel`."""

    def forward(self, network: nn.Module, x: Latents, point: GridPoint, condition: Condition) -> torch.Tensor:
        """Call the transformer as the pipeline does; a second half of its channels would be a variance."""
        v = network(
            x.to(self.dtype),
            encoder_hidden_states=condition.tensors["text"].to(self.dtype),
            encoder_attention_mask=condition.tensors["mask"],
            timestep=point.timestep.to(x.device, non_blocking=True),
            return_dict=False,
        )[0]
        return v[:, : x.shape[1]].float()

    def shape_of_latents(self) -> Size:
        """Return (C, F, H, W) for the configured size."""
        kind, _ = self.source.architecture.components["vae"]
        if kind != "AutoencoderKLWan":
            raise UserError(
                f"model.path: {self.config.path} has the autoencoder {kind}, which is not supported for this family; "
                "take the checkpoint of 480p, which has Wan's"
            )
        checked_size(self.config, MULTIPLE, self.pipeline.vae.config.scale_factor_temporal)
        return super().shape_of_latents()

    def original_name(self, name: str) -> str | None:
        """Return None: in the released checkpoint query, key and value are one layer."""
        return None
