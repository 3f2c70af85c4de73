"""Stable Diffusion 3 and 3.5 (medium, large), text to image: three text encoders, of which two are also pooled."""

from torch import nn

from flashgrpo.models.conditions import Row
from flashgrpo.models.image import ImageModel, Plane
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.seeds import normal
from flashgrpo.types import Condition

CLIP_LENGTH = 77  # places of text of both CLIP encoders, before those of T5


class Sd3Model(ImageModel):
    """A `StableDiffusion3Pipeline` as a `VideoModel` of one frame."""

    encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizer_name = "tokenizer_3"
    cached_parts = ("tokenizer", "tokenizer_2", "tokenizer_3", *encoder_names)

    def unused_layers(self) -> list[str]:
        """Name what makes the texts' queries in the last block, which hands on the picture's tokens only."""
        network = self.source.architecture.of("transformer")
        attention = f"transformer_blocks.{network['num_layers'] - 1}.attn"
        return [f"{attention}.add_q_proj", *([f"{attention}.norm_added_q"] if network.get("qk_norm") else [])]

    def encode_text(self, text: str) -> Row:
        """Return {"text": (1, 77 + L, D), "pooled": (1, P)} with L = `max_sequence_length` of T5."""
        embedding, _, pooled, _ = self.pipeline.encode_prompt(
            [text],
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
            device=self.device,
        )
        return {"text": embedding, "pooled": pooled}

    def random_text(self, text: str) -> Row:
        """Return rows as `encode_text` does."""
        network = self.source.architecture.of("transformer")
        shape = (1, CLIP_LENGTH + self.config.max_sequence_length, network["joint_attention_dim"])
        pooled = normal((1, network["pooled_projection_dim"]), self.seed, f"pooled:{text}")
        return {"text": normal(shape, self.seed, f"text:{text}"), "pooled": pooled}

    def predict(self, network: nn.Module, x: Plane, point: GridPoint, condition: Condition) -> Plane:
        """Call the transformer as the pipeline does."""
        return network(
            hidden_states=x.to(self.dtype),
            timestep=point.timestep.to(x.device, non_blocking=True),
            encoder_hidden_states=condition.tensors["text"].to(self.dtype),
            pooled_projections=condition.tensors["pooled"].to(self.dtype),
            return_dict=False,
        )[0]
