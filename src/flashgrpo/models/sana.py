"""Sana, text to image: linear attention on few, wide latents; an instruction goes before each text but the negative."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flashgrpo.models.conditions import Row
from flashgrpo.models.image import ImageModel, Plane
from flashgrpo.models.pipeline import PipelineModel
from flashgrpo.process import PipelineCall
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.seeds import normal
from flashgrpo.types import Condition


class SanaTexts(PipelineModel):
    """What Sana's pipelines of images and of videos make of texts."""

    def encode_text(self, text: str) -> Row:
        """Return {"text": (1, L, D), "mask": (1, L)} with L = `max_sequence_length`; the mask is 1 where a token is."""
        call = inspect.signature(type(self.pipeline).__call__).parameters
        instruction = call["complex_human_instruction"].default
        embedding, mask, _, _ = self.pipeline.encode_prompt(
            [text],
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.config.max_sequence_length,
            complex_human_instruction=None if text == self.config.negative_prompt else instruction,
        )
        return {"text": embedding, "mask": mask.to(torch.int64)}

    def random_text(self, text: str) -> Row:
        """Return rows as `encode_text` does, of a text that fills all places."""
        length, network = self.config.max_sequence_length, self.source.architecture.of("transformer")
        mask = torch.ones(1, length, dtype=torch.int64)
        return {"text": normal((1, length, network["caption_channels"]), self.seed, f"text:{text}"), "mask": mask}

    def pipeline_call(self, given: Mapping[str, Any]) -> PipelineCall:
        """Return the number of frames under the pipeline's name, and the size as it is, not the nearest of its own."""
        return super().pipeline_call({**given, "frames": self.config.num_frames, "use_resolution_binning": False})


class SanaModel(SanaTexts, ImageModel):
    """A `SanaPipeline` as a `VideoModel` of one frame."""

    patch = 1

    def predict(self, network: nn.Module, x: Plane, point: GridPoint, condition: Condition) -> Plane:
        """Call the transformer as the pipeline does; a second half of its channels would be a variance."""
        scale = self.source.architecture.of("transformer").get("timestep_scale", 1.0)
        v = network(
            x.to(self.dtype),
            encoder_hidden_states=condition.tensors["text"].to(self.dtype),
            encoder_attention_mask=condition.tensors["mask"],
            timestep=point.timestep.to(x.device, non_blocking=True) * scale,
            return_dict=False,
        )[0]
        return v[:, : x.shape[1]]
