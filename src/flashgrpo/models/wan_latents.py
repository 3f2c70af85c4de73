"""What families share that have the autoencoder of Wan: its latents' size, scale and decoding."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flashgrpo.models.architectures import checked_size
from flashgrpo.models.pipeline import PipelineModel, Size
from flashgrpo.types import Latents


class WanLatents(PipelineModel):
    """A pipeline with an `AutoencoderKLWan`, and a network whose patches have three sides."""

    def decode_latents(self, vae: Any, latents: Latents) -> Tensor:
        """Undo the latents' normalisation and decode."""
        return vae.decode(self.denormalized(latents).to(vae.dtype), return_dict=False)[0]

    def denormalized(self, latents: Latents) -> Latents:
        """Return latents in the autoencoder's own scale."""
        mean, std = self._latent_statistics
        return latents * std + mean

    def latents_for(self, frames: int) -> int:
        """Count the latent frames: the first stands for one frame, each further one for four."""
        return 1 + -(-(frames - 1) // self.pipeline.vae.config.scale_factor_temporal)

    @cached_property
    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        config = self.pipeline.vae.config
        return tuple(  # type: ignore[return-value]
            torch.tensor(values, device=self.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )

    def shape_of_latents(self) -> Size:
        """Return (C, F, H, W); a side is a multiple of what the autoencoder and the network's patches need."""
        vae, (_, patch, _) = self.pipeline.vae.config, self.source.architecture.of("transformer")["patch_size"]
        scale = vae.scale_factor_spatial
        frames = checked_size(self.config, scale * patch, vae.scale_factor_temporal)
        return vae.z_dim, frames, self.config.height // scale, self.config.width // scale

    def tokens(self) -> int:
        """Count the tokens of all patches."""
        patch_frames, patch_height, patch_width = self.source.architecture.of("transformer")["patch_size"]
        _, frames, height, width = self.latent_shape
        return (frames // patch_frames) * (height // patch_height) * (width // patch_width)
