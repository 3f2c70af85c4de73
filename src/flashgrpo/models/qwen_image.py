"""Qwen-Image, text to image: a vision-language model reads the text; guidance keeps the length of velocities."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashgrpo.models.conditions import Row
from flashgrpo.models.image import ImageModel, Plane, pack, padded, unpack
from flashgrpo.process import PipelineCall
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.seeds import normal
from flashgrpo.types import Condition, Latents


class QwenImageModel(ImageModel):
    """A `QwenImagePipeline` as a `VideoModel` of one frame."""

    def mu(self, num_steps: int) -> float | None:
        """Return the shift by the number of tokens."""
        return self.shift_by_tokens()

    def unused_layers(self) -> list[str]:
        """Name what only the texts' tokens go through in the last block, which hands on the picture's."""
        block = f"transformer_blocks.{self.source.architecture.of('transformer')['num_layers'] - 1}"
        return [f"{block}.{name}" for name in ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")]

    def encode_text(self, text: str) -> Row:
        """Return {"text": (1, L, D), "mask": (1, L)} with L = `max_sequence_length`; the mask is 1 where a token is."""
        length = self.config.max_sequence_length
        embedding, _ = self.pipeline.encode_prompt([text], device=self.device, max_sequence_length=length)
        mask = torch.ones(embedding.shape[:2], dtype=torch.int64, device=embedding.device)
        return {"text": padded(embedding, length), "mask": padded(mask, length)}

    def random_text(self, text: str) -> Row:
        """Return rows as `encode_text` does, of a text that fills all places."""
        length, network = self.config.max_sequence_length, self.source.architecture.of("transformer")
        mask = torch.ones(1, length, dtype=torch.int64)
        return {"text": normal((1, length, network["joint_attention_dim"]), self.seed, f"text:{text}"), "mask": mask}

    def pipeline_call(self, given: Mapping[str, Any]) -> PipelineCall:
        """Return the guidance scale under the pipeline's name, which takes none without a negative prompt."""
        own = {"true_cfg_scale": given["guidance_scale"], "negative_prompt": self.config.negative_prompt or " "}
        return super().pipeline_call({**given, "guidance_scale": None, **own})

    def predict(self, network: nn.Module, x: Plane, point: GridPoint, condition: Condition) -> Plane:
        """Call the transformer as the pipeline does, on tokens."""
        height, width = x.shape[-2:]
        tokens = network(
            hidden_states=pack(x).to(self.dtype),
            timestep=point.timestep.to(x.device, non_blocking=True) / 1000,
            encoder_hidden_states=condition.tensors["text"].to(self.dtype),
            encoder_hidden_states_mask=condition.tensors["mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def guided(self, v_text: Latents, v_negative: Latents, scale: Tensor) -> Latents:
        """Go from the negative prompt through the text, then give each token the length that the text's has."""
        straight = pack(super().guided(v_text, v_negative, scale)[:, :, 0])
        length = pack(v_text[:, :, 0]).norm(dim=-1, keepdim=True) / straight.norm(dim=-1, keepdim=True)
        return unpack(straight * length, *v_text.shape[-2:])[:, :, None]

    def latent_channels(self) -> int:
        """Return C of the latents."""
        return int(self.pipeline.vae.config.z_dim)

    def decode_latents(self, vae: Any, latents: Latents) -> Tensor:
        """Undo the latents' normalisation and decode, by an autoencoder of videos."""
        values = vae.config.latents_mean, vae.config.latents_std
        mean, std = (torch.tensor(value, device=latents.device).view(1, -1, 1, 1, 1) for value in values)
        return vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]

    def original_name(self, name: str) -> str | None:
        """Keep the name: the released layers are called alike."""
        return name if name.startswith("transformer_blocks.") else None
