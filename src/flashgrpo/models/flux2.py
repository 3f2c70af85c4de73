"""FLUX.2 klein, text to image: Qwen3 reads the text; latents are 2 x 2 patches, normalised by running statistics."""

from typing import Any

from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn

from flashgrpo.models.conditions import Row
from flashgrpo.models.image import ImageModel, Plane, places
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.seeds import normal
from flashgrpo.types import Condition, Latents


class Flux2KleinModel(ImageModel):
    """A `Flux2KleinPipeline` as a `VideoModel` of one frame; a distilled checkpoint has no guidance."""

    patch = 1
    keeps_spacing = True

    def mu(self, num_steps: int) -> float | None:
        """Return the shift by the numbers of tokens and of steps."""
        return compute_empirical_mu(self.tokens(), num_steps)

    def encode_text(self, text: str) -> Row:
        """Return {"text": (1, L, D)} with L = `max_sequence_length`."""
        embedding, _ = self.pipeline.encode_prompt(
            [text], device=self.device, max_sequence_length=self.config.max_sequence_length
        )
        return {"text": embedding}

    def random_text(self, text: str) -> Row:
        """Return a row as `encode_text` does."""
        width = self.source.architecture.of("transformer")["joint_attention_dim"]
        return {"text": normal((1, self.config.max_sequence_length, width), self.seed, f"text:{text}")}

    def predict(self, network: nn.Module, x: Plane, point: GridPoint, condition: Condition) -> Plane:
        """Call the transformer as the pipeline does, on tokens."""
        height, width = x.shape[-2:]
        text = condition.tensors["text"].to(self.dtype)
        tokens = network(
            hidden_states=x.flatten(2).transpose(1, 2).to(self.dtype),
            timestep=point.timestep.to(x.device, non_blocking=True) / 1000,
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=places(1, 1, 1, text.shape[1], device=x.device).expand(len(x), -1, -1),
            img_ids=places(1, height, width, 1, device=x.device).expand(len(x), -1, -1),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def pixels(self) -> int:
        """Return the pixels along a side of a latent, which is a patch of four."""
        return 2 * super().pixels()

    def latent_channels(self) -> int:
        """Return C of the latents."""
        return int(self.source.architecture.of("transformer")["in_channels"])

    def decode_latents(self, vae: Any, latents: Latents) -> Tensor:
        """Undo the normalisation, lay the patches out and decode."""
        mean = vae.bn.running_mean.view(1, -1, 1, 1).float()
        std = (vae.bn.running_var.view(1, -1, 1, 1).float() + vae.config.batch_norm_eps).sqrt()
        planes = nn.functional.pixel_shuffle(latents[:, :, 0] * std + mean, 2)
        return vae.decode(planes.to(vae.dtype), return_dict=False)[0][:, :, None]
