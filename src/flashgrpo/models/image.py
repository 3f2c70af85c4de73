"""What families of images share: a picture is a video of one frame, (B, C, 1, H, W) in latents."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flashgrpo.errors import UserError
from flashgrpo.models.architectures import checked_size
from flashgrpo.models.pipeline import PipelineModel, Size
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.types import Condition, Latents

Plane = Float[Tensor, "batch channels height width"]
Tokens = Float[Tensor, "batch tokens features"]


def pack(x: Plane) -> Tokens:
    """Make a token of each 2 x 2 latents: (B, C, H, W) -> (B, H W / 4, 4 C), rows first."""
    return nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tokens, height: int, width: int) -> Plane:
    """Undo `pack` for latents of this height and width."""
    planes = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return nn.functional.pixel_shuffle(planes, 2)


def places(*sides: int, device: torch.device) -> Float[Tensor, "tokens axes"]:
    """Return where each token of a grid stands, one number for each axis, the last axis fastest."""
    axes = torch.meshgrid(*(torch.arange(side, device=device) for side in sides), indexing="ij")
    return torch.stack(axes, dim=-1).flatten(0, -2).float()


def padded(rows: Tensor, length: int) -> Tensor:
    """Return rows (1, L', ...) with zeros up to L = `length` places."""
    return torch.cat([rows, rows.new_zeros(1, length - rows.shape[1], *rows.shape[2:])], dim=1)


class ImageModel(PipelineModel):
    """A pipeline of images as a `VideoModel` of one frame."""

    patch: ClassVar[int] = 2
    """Latents along a side of a token."""

    @abstractmethod
    def predict(self, network: nn.Module, x: Plane, point: GridPoint, condition: Condition) -> Plane:
        """Compute the velocity of latents without an axis of frames, as the pipeline calls its transformer."""

    def forward(self, network: nn.Module, x: Latents, point: GridPoint, condition: Condition) -> Tensor:
        """Compute the velocity of the one frame."""
        return self.predict(network, x[:, :, 0], point, condition).float()[:, :, None].contiguous()

    def shape_of_latents(self) -> Size:
        """Return (C, 1, H, W); a side is a multiple of what the autoencoder and the network's patches need."""
        config, scale = self.config, self.pixels()
        if config.num_frames != 1:
            raise UserError(f"model.num_frames: this model makes images, which are 1 frame, not {config.num_frames}")
        checked_size(config, scale * self.patch, 1)
        return self.latent_channels(), 1, config.height // scale, config.width // scale

    def pixels(self) -> int:
        """Return the pixels along a side of a latent."""
        return int(self.pipeline.vae_scale_factor)

    def latent_channels(self) -> int:
        """Return C of the latents."""
        return int(self.pipeline.vae.config.latent_channels)

    def tokens(self) -> int:
        """Count the tokens of the picture."""
        *_, height, width = self.latent_shape
        return (height // self.patch) * (width // self.patch)

    def decode_latents(self, vae: Any, latents: Latents) -> Tensor:
        """Undo the latents' normalisation and decode the one frame."""
        return vae.decode(self.denormalized(latents[:, :, 0]).to(vae.dtype), return_dict=False)[0][:, :, None]

    def denormalized(self, latents: Plane) -> Plane:
        """Return latents in the autoencoder's own scale."""
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def original_name(self, name: str) -> str | None:
        """Return None: the file in diffusers' style is the one to share."""
        return None
