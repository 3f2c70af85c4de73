"""FLUX.1 (dev, schnell), text to image; dev is fed its guidance scale and has one branch only."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from flashgrpo.models.conditions import Row
from flashgrpo.models.image import ImageModel, Plane, Tokens, pack, places, unpack
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.seeds import normal
from flashgrpo.types import Condition


class FluxModel(ImageModel):
    """A `FluxPipeline` as a `VideoModel` of one frame."""

    keeps_spacing = True
    encoder_names = ("text_encoder", "text_encoder_2")
    tokenizer_name = "tokenizer_2"
    cached_parts: ClassVar[Sequence[str]] = ("tokenizer", "tokenizer_2", *encoder_names)

    def mu(self, num_steps: int) -> float | None:
        """Return the shift by the number of tokens."""
        return self.shift_by_tokens()

    def encode_text(self, text: str) -> Row:
        """Return {"text": (1, L, D) of T5, "pooled": (1, P) of CLIP}."""
        embedding, pooled, _ = self.pipeline.encode_prompt(
            [text], max_sequence_length=self.config.max_sequence_length, device=self.device
        )
        return {"text": embedding, "pooled": pooled}

    def random_text(self, text: str) -> Row:
        """Return rows as `encode_text` does."""
        network = self.source.architecture.of("transformer")
        shape = (1, self.config.max_sequence_length, network["joint_attention_dim"])
        pooled = normal((1, network["pooled_projection_dim"]), self.seed, f"pooled:{text}")
        return {"text": normal(shape, self.seed, f"text:{text}"), "pooled": pooled}

    def predict(self, network: nn.Module, x: Plane, point: GridPoint, condition: Condition) -> Plane:
        """Call the transformer as the pipeline does, on tokens."""
        height, width = x.shape[-2:]
        ids = places(1, height // 2, width // 2, device=x.device)
        return unpack(self.predict_tokens(network, pack(x), ids, point, condition), height, width)

    def predict_tokens(
        self, network: nn.Module, tokens: Tokens, ids: torch.Tensor, point: GridPoint, condition: Condition
    ) -> Tokens:
        """Compute the velocity of tokens that stand at `ids`."""
        text, device = condition.tensors["text"], tokens.device
        scale = point.guidance_scale.to(device, non_blocking=True) if self.guidance == "embedded" else None
        return network(
            hidden_states=tokens.to(self.dtype),
            timestep=point.timestep.to(device, non_blocking=True) / 1000,
            guidance=scale,
            pooled_projections=condition.tensors["pooled"].to(self.dtype),
            encoder_hidden_states=text.to(self.dtype),
            txt_ids=torch.zeros(text.shape[1], 3, device=device),
            img_ids=ids,
            return_dict=False,
        )[0]
