"""Decoding a video in parts: a prefix once, and each block after it from what the decoder remembers."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from jaxtyping import Float
from torch import Tensor

from flashgrpo.types import Latents

Feature = Tensor | str | None


@dataclass(frozen=True)
class DecoderState:
    """What the causal convolutions remember of the frames so far. It never changes, so branches may share it."""

    features: tuple[Feature, ...]

    def expanded(self, rows: int) -> "DecoderState":
        """Return the state of one video as that of `rows` equal ones; no memory is taken."""
        return DecoderState(
            tuple(f.expand(rows, *f.shape[1:]) if isinstance(f, Tensor) else f for f in self.features),
        )


class StreamDecoder:
    """diffusers' `AutoencoderKLWan`, decoding as its own `decode` does, frame by frame, with the memory given out.

    Args:
        vae: the autoencoder, which may be of Wan 2.1 or 2.2.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @torch.no_grad()
    def decode(
        self, latents: Latents, state: DecoderState | None = None
    ) -> tuple[Float[Tensor, "batch 3 video_frames video_height video_width"], DecoderState]:
        """Decode the next latent frames.

        Args:
            latents: (B, C, F, H, W), not normalised; the next after those that `state` has seen.
            state: None at the beginning of the video, whose first latent frame is one frame.

        Returns:
            The video's next frames in [-1, 1], equal to those that decoding all at once gives; and the state after.
        """
        features: list[Feature] = list(state.features) if state else [None] * self.vae._cached_conv_counts["decoder"]
        parts = []
        for number, frame in enumerate(self.vae.post_quant_conv(latents).split(1, dim=2)):
            first = state is None and number == 0
            parts.append(self.vae.decoder(frame, feat_cache=features, feat_idx=[0], first_chunk=first))
        video = torch.cat(parts, dim=2)
        if self.vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=self.vae.config.patch_size)
        return video.clamp(-1, 1), DecoderState(tuple(features))
