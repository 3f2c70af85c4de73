"""LTX-Video, text to video: another family, to show that a model is one file."""

from typing import Any

import torch
from torch import Tensor, nn

from flashgrpo.errors import UserError
from flashgrpo.models.architectures import checked_size
from flashgrpo.models.conditions import Row
from flashgrpo.models.pipeline import PipelineModel, Size
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.seeds import normal
from flashgrpo.types import Condition, Latents


class LtxModel(PipelineModel):
    """An `LTXPipeline` as a `VideoModel`. The network takes tokens; here latents are (B, C, F, H, W) as everywhere."""

    def mu(self, num_steps: int) -> float | None:
        """Return the shift by the number of tokens."""
        return self.shift_by_tokens()

    def encode_text(self, text: str) -> Row:
        """Return {"text": (1, L, D), "mask": (1, L)} with L = `max_sequence_length`; the mask is 1 where a token is."""
        embedding, mask, _, _ = self.pipeline.encode_prompt(
            [text],
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
            device=self.device,
        )
        return {"text": embedding, "mask": mask.to(torch.int64)}

    def random_text(self, text: str) -> Row:
        """Return rows as `encode_text` does, of a text that fills all places."""
        length, network = self.config.max_sequence_length, self.source.architecture.of("transformer")
        mask = torch.ones(1, length, dtype=torch.int64)
        return {"text": normal((1, length, network["caption_channels"]), self.seed, f"text:{text}"), "mask": mask}

    def forward(self, network: nn.Module, x: Latents, point: GridPoint, condition: Condition) -> Tensor:
        """Call the transformer as the pipeline does, on tokens."""
        pipeline, patch = self.pipeline, self._patch()
        _, _, frames, height, width = x.shape
        ratios = pipeline.vae.temporal_compression_ratio, pipeline.vae.spatial_compression_ratio
        v = network(
            hidden_states=pipeline._pack_latents(x, *patch).to(self.dtype),
            encoder_hidden_states=condition.tensors["text"].to(self.dtype),
            timestep=point.timestep.to(x.device, non_blocking=True),
            encoder_attention_mask=condition.tensors["mask"].bool(),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(ratios[0] / self.config.fps, ratios[1], ratios[1]),
            return_dict=False,
        )[0].float()
        sides = frames // patch[1], height // patch[0], width // patch[0]
        return pipeline._unpack_latents(v, *sides, *patch).contiguous()

    def decode_latents(self, vae: Any, latents: Latents) -> Tensor:
        """Undo the latents' normalisation and decode; without noise where the decoder could take some."""
        mean, std = (values.to(latents).view(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
        latents = (latents * std / vae.config.scaling_factor + mean).to(vae.dtype)
        timestep = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        return vae.decode(latents, timestep, return_dict=False)[0]

    def shape_of_latents(self) -> Size:
        """Return (C, F, H, W) for the configured size."""
        length, attention = self.config.max_sequence_length, self.config.attention
        if self.device.type == "cuda" and length % 128 == 64 and attention in (None, "native", "_native_cudnn"):
            raise UserError(
                f"model.max_sequence_length: masked attention of cuDNN over {length} places of text can give NaN on "
                "a GPU (at 64 more than a multiple of 128); take a multiple of 128"
            )
        vae = self.pipeline.vae
        scale, patch = vae.spatial_compression_ratio, self._patch()
        frames = checked_size(self.config, scale * patch[0], vae.temporal_compression_ratio)
        return vae.config.latent_channels, frames, self.config.height // scale, self.config.width // scale

    def tokens(self) -> int:
        """Count the tokens of all patches."""
        _, frames, height, width = self.latent_shape
        patch, patch_frames = self._patch()
        return (frames // patch_frames) * (height // patch) * (width // patch)

    def _patch(self) -> tuple[int, int]:
        """Return the latents in a token: along a side, along time."""
        network = self.source.architecture.of("transformer")
        return network.get("patch_size", 1), network.get("patch_size_t", 1)

    def original_name(self, name: str) -> str | None:
        """Keep the name: the blocks' linear layers are called alike; names outside of the blocks differ."""
        return name if name.startswith("transformer_blocks.") else None
