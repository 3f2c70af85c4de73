"""HunyuanVideo-1.5, text or image to video: Qwen2.5-VL and ByT5 for texts, and SigLIP for a first frame.

Guidance is a component of the checkpoint, the `guider`; what a recipe sets is its scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flashgrpo.errors import UserError
from flashgrpo.models.architectures import checked_size
from flashgrpo.models.conditions import Row
from flashgrpo.models.hunyuan_network import States, joint_forward, masked_at_once
from flashgrpo.models.pipeline import PipelineModel, Size, Spacing
from flashgrpo.process import PipelineCall
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.seeds import normal
from flashgrpo.types import Condition, Latents

GLYPH_LENGTH = 256  # places of the words in quotes that ByT5 spells


class HunyuanModel(PipelineModel):
    """A `HunyuanVideo15Pipeline` or `HunyuanVideo15ImageToVideoPipeline` as a `VideoModel`."""

    encoder_names = ("text_encoder", "text_encoder_2", "image_encoder")

    @property
    def takes_image(self) -> bool:  # type: ignore[override]
        """Whether a prompt has to bring its first frame."""
        return "ImageToVideo" in type(self.pipeline).__name__

    @property
    def cached_parts(self) -> Sequence[str]:  # type: ignore[override]
        """The encoders of texts, and with images all that looks at them."""
        text = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
        return (*text, "feature_extractor", "image_encoder", "vae") if self.takes_image else text

    def unused_layers(self) -> list[str]:
        """Name what the last block makes of the texts alone, since it hands on the video's tokens only."""
        block = f"transformer_blocks.{self.source.architecture.of('transformer').get('num_layers', 54) - 1}"
        attention = [f"{block}.attn.{name}" for name in ("add_q_proj", "norm_added_q", "to_add_out")]
        return [*attention, f"{block}.ff_context", *([] if self.takes_image else ["image_embedder"])]

    # Prompts

    def encode_text(self, text: str) -> Row:
        """Return {"text": (1, L, D), "mask": (1, L)} with L = `max_sequence_length`, and the same of `glyphs`."""
        self.pipeline.tokenizer_max_length = self.config.max_sequence_length
        text_states, mask, glyphs, glyph_mask = self.pipeline.encode_prompt([text], self.device, self.dtype)
        masks = {"mask": mask.to(torch.int64), "glyph_mask": glyph_mask.to(torch.int64)}
        return {"text": text_states, "glyphs": glyphs, **masks}

    def random_text(self, text: str) -> Row:
        """Return rows as `encode_text` does, of a text that fills all places and has nothing in quotes."""
        network, length = self.source.architecture.of("transformer"), self.config.max_sequence_length
        return {
            "text": normal((1, length, network.get("text_embed_dim", 3584)), self.seed, f"text:{text}"),
            "mask": torch.ones(1, length, dtype=torch.int64),
            "glyphs": torch.zeros(1, GLYPH_LENGTH, network.get("text_embed_2_dim", 1472)),
            "glyph_mask": torch.zeros(1, GLYPH_LENGTH, dtype=torch.int64),
        }

    def encode_image(self, image: Any) -> Row:
        """Return {"image": (1, T, D)} of SigLIP, "latents" (1, C + 1, F, H, W): the first frame, and where it is."""
        pipeline, size = self.pipeline, {"height": self.config.height, "width": self.config.width}
        picture = pipeline.video_processor.resize(self.fitted(image), **size)
        frame = pipeline.video_processor.preprocess(picture, **size)
        vae = masked_at_once(self.part("vae"))
        given = self._given()
        encoded = vae.encode(frame.to(self.device, vae.dtype)[:, :, None]).latent_dist.mode().float()
        given[:, :-1, :1] = encoded * vae.config.scaling_factor
        given[:, -1, 0] = 1
        if self.source.random:
            return {"image": torch.ones_like(self._no_image()), "latents": given}
        return {"image": pipeline.encode_image(picture, 1, self.device, self.dtype), "latents": given}

    def nothing(self) -> Condition:
        """Return the negative prompt, and zeros for an image."""
        row = dict(super().nothing().tensors)
        return Condition({**row, "image": self._no_image(), "latents": self._given()} if self.takes_image else row)

    def _given(self) -> Latents:
        channels, frames, height, width = self.latent_shape
        return torch.zeros(1, channels + 1, frames, height, width, device=self.device)

    def _no_image(self) -> States:
        width = self.source.architecture.of("transformer").get("image_embed_dim", 1152)
        return torch.zeros(1, self.pipeline.vision_num_semantic_tokens, width, device=self.device)

    # The network

    def _check_checkpoint(self) -> None:
        architecture = self.source.architecture
        kind, guider = architecture.components.get("guider", ("no guider", {}))
        odd = guider.get("start") or guider.get("stop", 1) < 1 or guider.get("guidance_rescale")
        if kind != "ClassifierFreeGuidance" or odd or guider.get("use_original_formulation"):
            raise UserError(
                f"model.path: the guider of {self.config.path} is {kind} with settings that a rollout has not; "
                "a ClassifierFreeGuidance from the first step to the last, without rescaling, is supported"
            )
        if architecture.of("transformer").get("use_meanflow"):
            raise UserError(
                f"model.path: the network of {self.config.path} is told the next step beside this one (MeanFlow), "
                "which is not supported; take the checkpoint that is not distilled by steps"
            )

    def spacing(self, num_steps: int) -> Spacing:
        """Return even steps, which the pipeline gives any scheduler."""
        return np.linspace(1.0, 0.0, num_steps + 1)[:-1]

    def forward(self, network: nn.Module, x: Latents, point: GridPoint, condition: Condition) -> Tensor:
        """Call the transformer as the pipeline does, on latents with the channels of a frame that is given."""
        if "forward" not in vars(network):
            network.forward = MethodType(joint_forward, network)
        rows = condition.tensors
        given = rows["latents"] if self.takes_image else self._given().expand(len(x), -1, -1, -1, -1)
        v: Tensor = network(
            torch.cat([x, given], dim=1).to(self.dtype),
            point.timestep.to(x.device, self.dtype, non_blocking=True),
            [(rows["text"].to(self.dtype), rows["mask"]), (rows["glyphs"].to(self.dtype), rows["glyph_mask"])],
            rows["image"].to(self.dtype) if self.takes_image else None,
        )
        return v.float()

    def decode_latents(self, vae: Any, latents: Latents) -> Tensor:
        """Undo the latents' scale and decode, one video at a time: attention of diffusers' decoder takes no more."""
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor
        vae = masked_at_once(vae)
        return torch.cat([vae.decode(one, return_dict=False)[0] for one in scaled.split(1)])

    def shape_of_latents(self) -> Size:
        """Return (C, F, H, W) for the configured size; a checkpoint whose guidance cannot be had is refused."""
        self._check_checkpoint()
        vae, patch = self.pipeline.vae.config, self.source.architecture.of("transformer").get("patch_size", 1)
        scale = vae.spatial_compression_ratio
        frames = checked_size(self.config, scale * patch, vae.temporal_compression_ratio)
        return vae.latent_channels, frames, self.config.height // scale, self.config.width // scale

    def tokens(self) -> int:
        """Count the tokens of the video, beside which the texts' stand."""
        network, (_, frames, height, width) = self.source.architecture.of("transformer"), self.latent_shape
        patch = network.get("patch_size", 1)
        return frames // network.get("patch_size_t", 1) * (height // patch) * (width // patch)

    def original_name(self, name: str) -> str | None:
        """Return None: the file in diffusers' style is the one to share."""
        return None

    def pipeline_call(self, given: Mapping[str, Any]) -> PipelineCall:
        """Return the scale as the guider's, and the length of texts as the pipeline's."""
        attributes = {"tokenizer_max_length": self.config.max_sequence_length}
        attributes |= {} if self.guidance == "none" else {"guider.guidance_scale": given["guidance_scale"]}
        return replace(super().pipeline_call(given), attributes=attributes)
