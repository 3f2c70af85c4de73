"""The decoder of images in codes (IBQ) of URSA's checkpoints: embeddings of codes, and a convolutional decoder.

The names of its weights are those of diffusers' autoencoders, whose `Decoder` it is; the encoder is not loaded.
"""

from collections.abc import Mapping
from typing import Any

from diffusers.models.autoencoders.vae import Decoder
from jaxtyping import Float, Int64
from torch import Tensor, nn

DEFAULTS: Mapping[str, Any] = {
    "out_channels": 3,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "num_vq_embeddings": 16384,
    "vq_embed_dim": 8,
    "attn_up_block": False,
    "spatial_stride": 16,
    "temporal_stride": 1,
    "_quantizer_name": "VQuantizer",
}
"""What a checkpoint means that leaves them out."""


Codes = Int64[Tensor, "batch frames rows columns"]
Pictures = Float[Tensor, "batch video_frames 3 height width"]


class Codebook(nn.Module):
    """Embeddings of codes."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, dim)


class IbqDecoder(nn.Module):
    """Decodes grids of codes to images.

    Attributes:
        frames: of codes, that it decodes at once at most.

    Args:
        settings: of the checkpoint's `vae/config.json`, completed by `DEFAULTS`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.frames = 1
        channels = tuple(settings["block_out_channels"])
        first = "AttnUpDecoderBlock2D" if settings["attn_up_block"] else "UpDecoderBlock2D"
        self.quantizer = Codebook(settings["num_vq_embeddings"], settings["vq_embed_dim"])
        self.post_quant_conv = nn.Conv2d(settings["vq_embed_dim"], settings["latent_channels"], 1)
        self.decoder = Decoder(
            in_channels=settings["latent_channels"],
            out_channels=settings["out_channels"],
            up_block_types=(first, *("UpDecoderBlock2D",) * (len(channels) - 1)),
            block_out_channels=channels,
            layers_per_block=settings["layers_per_block"],
            norm_num_groups=settings["norm_num_groups"],
        )

    def forward(self, codes: Codes) -> Pictures:
        """Return images in [-1, 1], which rounding may leave, as videos of one frame."""
        latents = self.quantizer.embedding(codes[:, 0]).permute(0, 3, 1, 2)
        images: Tensor = self.decoder(self.post_quant_conv(latents))
        return images[:, None]
