"""Z-Image (and its distilled Turbo), text to image: the network is called on one picture at a time.

The transformer has as many places for a text as that text needs, so that rows of a batch would differ in length, and be
computed otherwise beside other rows. Its velocity is x0 - eps, and its pipeline counts a guidance scale from 0: what is
4 there is 5 here, and 0 there, which Turbo is for, is 1.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError
from flashgrpo.models.conditions import Row
from flashgrpo.models.image import ImageModel, Plane, padded
from flashgrpo.process import PipelineCall
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.seeds import normal
from flashgrpo.types import Condition


class ZImageModel(ImageModel):
    """A `ZImagePipeline` as a `VideoModel` of one frame."""

    def mu(self, num_steps: int) -> float | None:
        """Return the shift by the number of tokens."""
        return self.shift_by_tokens()

    def encode_text(self, text: str) -> Row:
        """Return {"text": (1, L, D), "host_length": (1, 1)}, the number of places in use, L = `max_sequence_length`."""
        length = self.config.max_sequence_length
        [embedding], _ = self.pipeline.encode_prompt(
            [text], self.device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"text": padded(embedding[None], length), "host_length": torch.tensor([[len(embedding)]])}

    def random_text(self, text: str) -> Row:
        """Return rows as `encode_text` does, of a text that fills all places."""
        length, network = self.config.max_sequence_length, self.source.architecture.of("transformer")
        embedding = normal((1, length, network["cap_feat_dim"]), self.seed, f"text:{text}")
        return {"text": embedding, "host_length": torch.tensor([[length]])}

    def pipeline_call(self, given: Mapping[str, Any]) -> PipelineCall:
        """Return the guidance scale as the pipeline counts it."""
        return super().pipeline_call({**given, "guidance_scale": given["guidance_scale"] - 1})

    def predict(self, network: nn.Module, x: Plane, point: GridPoint, condition: Condition) -> Plane:
        """Call the transformer as the pipeline does, a row at a time."""
        texts, x = condition.tensors["text"].to(self.dtype), x.to(self.dtype)[:, :, None]
        lengths = condition.tensors["host_length"].flatten().tolist()
        done = (1000 - point.timestep.to(x.device, torch.float32, non_blocking=True)) / 1000
        rows = [
            network([x[row]], done[row : row + 1], [texts[row, :length]], return_dict=False)[0][0]
            for row, length in enumerate(lengths)
        ]
        return -torch.stack(rows)[:, :, 0].float()

    def _prepare_experts(self, world: World) -> dict[str, nn.Module]:
        if world.uses_fsdp or world.context > 1:
            raise UserError(
                "parallel: the network of Z-Image is called on one picture at a time, differently often on each "
                "process, so it cannot be held between several; leave shard, context and compute_dtype out"
            )
        return super()._prepare_experts(world)

    def original_name(self, name: str) -> str | None:
        """Keep the name: the released layers are called alike."""
        return name if name.startswith(("layers.", "noise_refiner.", "context_refiner.")) else None
