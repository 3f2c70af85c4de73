"""Wan 2.1 and 2.2, text or image to video, and SkyReels-V2 on its body; the bundled model is one with tiny widths.

| checkpoint | image | noise levels |
|---|---|---|
| 2.1 T2V, 1.3B and 14B | | one network |
| 2.1 I2V, 14B | encoded by CLIP and by the autoencoder; its latents are further channels | one network |
| 2.1 FLF2V, 14B | a first and a last one, both as above | one network |
| 2.2 TI2V, 5B | optional; its latents stand in for the first frame, which is fed timestep 0 | one network |
| 2.2 T2V and I2V, A14B | I2V: by the autoencoder, further channels | two experts, each with its guidance scale |
| SkyReels-V2 T2V and I2V | as 2.1 | one network |
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flashgrpo.errors import UserError
from flashgrpo.models.conditions import Row
from flashgrpo.models.families import STREAMING
from flashgrpo.models.pipeline import Size
from flashgrpo.models.wan_latents import WanLatents
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.seeds import normal
from flashgrpo.types import IMAGE_COLUMNS, Condition, Latents

CLIP_LENGTH = 512  # places of text that diffusers' attention splits off from what CLIP says about an image
SHIFT_720P = 5.0  # https://huggingface.co/docs/diffusers/api/pipelines/wan: 3.0 for 480p, 5.0 for 720p
SHIFT_SKYREELS, SHIFT_SKYREELS_IMAGE = 8.0, 5.0  # the example of diffusers' pipeline; its scheduler says none
PIXELS_720P = 704 * 1280  # Wan 2.2 5B's "720p" is the smallest
ImageRow = Float[Tensor, "1 channels frames height width"]


class WanModel(WanLatents):
    """A `WanPipeline`, `SkyReelsV2Pipeline`, or the one of images of either, as a `VideoModel`."""

    expert_names = ("transformer", "transformer_2")
    encoder_names = ("text_encoder", "image_encoder")

    @property
    def takes_image(self) -> bool:  # type: ignore[override]
        """Whether a prompt has to bring its first frame."""
        return "ImageToVideo" in type(self.pipeline).__name__

    @property
    def cached_parts(self) -> Sequence[str]:  # type: ignore[override]
        """The text's encoder, and with images all that looks at them."""
        text = ("tokenizer", "text_encoder")
        return (*text, "image_processor", "image_encoder", "vae") if self.takes_image else text

    def unused_layers(self) -> list[str]:
        """Name what embeds finished blocks of AnyFlow-FAR, which are cached without a gradient."""
        return ["far_patch_embedding"] if self.source.architecture.family in STREAMING else []

    # Prompts

    def encode_text(self, text: str) -> Row:
        """Return {"text": (1, max_sequence_length, D)}, zero after the text's tokens."""
        embedding, _ = self.pipeline.encode_prompt(
            [text],
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
            device=self.device,
        )
        return {"text": embedding}

    def random_text(self, text: str) -> Row:
        """Return a row as `encode_text` does, without zeros."""
        shape = (1, self.config.max_sequence_length, self.source.architecture.of("transformer")["text_dim"])
        return {"text": normal(shape, self.seed, f"text:{text}")}

    @property
    def image_columns(self) -> Sequence[str]:
        """A first frame; and a last one, where the network tells what CLIP says about either by its place."""
        both = self.source.architecture.of("transformer").get("pos_embed_seq_len") is not None
        return IMAGE_COLUMNS if both else super().image_columns

    def encode_images(self, images: Sequence[Any]) -> Row:
        """Return what the first frame, or the first and the last, add to a row.

        "latents" (1, C', F, H, W) are the further channels of I2V: 4 of a mask and those of the encoded frames, or with
        `expand_timesteps` the encoded frame alone, F = 1. Wan 2.1 also looks at the frames through CLIP: "image".
        """
        config, pipeline = self.config, self.pipeline
        pictures = [self.fitted(image) for image in images]
        size = {"height": config.height, "width": config.width}
        frames = torch.cat([pipeline.video_processor.preprocess(picture, **size) for picture in pictures])
        row = {"latents": self._encode_frames(frames.to(self.device, torch.float32))}
        if self.source.architecture.of("transformer").get("image_dim") is not None:
            if self.source.random:
                row["image"] = torch.ones_like(self._no_image())
            elif pipeline.image_encoder is None:
                raise UserError(f"model.path: {config.path} has no image_encoder, which its transformer needs")
            else:
                row["image"] = pipeline.encode_image(pictures, self.device).flatten(0, 1)[None]
        return row

    def _encode_frames(self, frames: Float[Tensor, "given 3 video_height video_width"]) -> ImageRow:
        vae: Any = self.part("vae")
        video = frames[None, :1].transpose(1, 2)
        if not self.pipeline.config.get("expand_timesteps"):
            between = video.new_zeros(1, 3, self.config.num_frames - len(frames), *frames.shape[-2:])
            video = torch.cat([video, between, frames[None, 1:].transpose(1, 2)], dim=2)
        encoded = vae.encode(video.to(vae.dtype)).latent_dist.mode().float()
        mean, std = self._latent_statistics
        encoded = (encoded - mean) / std
        if self.pipeline.config.get("expand_timesteps"):
            return encoded
        given = torch.zeros(1, vae.config.scale_factor_temporal, *encoded.shape[2:], device=self.device)
        given[:, :, 0] = 1  # the first frame of latents stands for one frame of the video, which is given
        if len(frames) > 1:
            given[:, -1, -1] = 1  # the last of those that the last one stands for
        return torch.cat([given, encoded], dim=1).to(self.dtype)  # as the network takes it; half as much to keep

    def nothing(self) -> Condition:
        """Return the negative prompt, and zeros for an image."""
        row = dict(super().nothing().tensors)
        if self.takes_image:
            channels, frames, height, width = self.latent_shape
            if not self.pipeline.config.get("expand_timesteps"):
                channels = self.source.architecture.of("transformer")["in_channels"] - channels
            else:
                frames = 1
            row["latents"] = torch.zeros(1, channels, frames, height, width, device=self.device)
            if self.source.architecture.of("transformer").get("image_dim") is not None:
                row["image"] = self._no_image()
        return Condition(row)

    def _no_image(self) -> Float[Tensor, "1 places width"]:
        """Return zeros in place of what CLIP says, of as many images as a prompt brings."""
        width = self.source.architecture.of("transformer")["image_dim"]
        return torch.zeros(1, 257 * len(self.image_columns), width, device=self.device)

    # The network

    def expert_at(self, timestep: float) -> str:
        """Return the second expert below the boundary."""
        boundary = self.pipeline.config.get("boundary_ratio")
        training_steps = self.pipeline.scheduler.config.num_train_timesteps
        return self.expert_names[int(boundary is not None and timestep < boundary * training_steps)]

    def forward(self, network: nn.Module, x: Latents, point: GridPoint, condition: Condition) -> Tensor:
        """Call the transformer as the pipeline does.

        With `expand_timesteps` each token has a timestep of its own. A frame that is given is fed at timestep 0 in
        place of x, and its velocity is the one that leads to it, `(x - frame) / sigma`: known, so nothing is learnt
        from it, and every solver ends at it.
        """
        extra = condition.tensors.get("latents")
        timestep = point.timestep.to(x.device, non_blocking=True)
        fed, given = x, None
        if self.pipeline.config.get("expand_timesteps"):
            timestep = timestep[:, None].repeat(1, self.tokens())
            if extra is not None:
                given = extra
                fed = torch.cat([given, x[:, :, 1:]], dim=2)
                timestep[:, : self.tokens() // x.shape[2]] = 0
        elif extra is not None:
            fed = torch.cat([x, extra], dim=1)
        image = condition.tensors.get("image")
        if image is not None:  # the images of a prompt one after the other, which the network puts together
            image = image.unflatten(1, (len(self.image_columns), -1)).flatten(0, 1).to(self.dtype)
        v = network(
            fed.to(self.dtype),
            timestep,
            condition.tensors["text"].to(self.dtype),
            image,
            return_dict=False,
        )[0].float()
        if given is not None:
            sigma = point.sigma.to(x.device, torch.float32, non_blocking=True).view(-1, 1, 1, 1, 1)
            v = torch.cat([(x[:, :, :1] - given) / sigma, v[:, :, 1:]], dim=2)
        return v

    def shape_of_latents(self) -> Size:
        """Return (C, F, H, W); a side is a multiple of what the autoencoder and the network's patches need."""
        network = self.source.architecture.of("transformer")
        if network.get("image_dim") is not None and self.config.max_sequence_length != CLIP_LENGTH:
            raise UserError(
                f"model.max_sequence_length: this network tells text from image by {CLIP_LENGTH} places of text, "
                f"not {self.config.max_sequence_length}"
            )
        if len(self.image_columns) > 1 and self.config.num_frames == 1:
            raise UserError("model.num_frames: a video from a first frame to a last one has more than 1")
        shape = super().shape_of_latents()
        own, (advised, why) = self.pipeline.scheduler.config.get("flow_shift"), self._advised_shift()
        if self.config.shift is None and own is not None and own < advised:
            self.say(f"the checkpoint's scheduler has flow_shift {own:g}{why}: model.shift={advised:g}")
        return shape

    def _advised_shift(self) -> tuple[float, str]:
        """Return the flow shift that the authors advise, 0 where the scheduler's own will do, and a word on it."""
        if type(self.pipeline).__name__.startswith("SkyReels"):
            shift = SHIFT_SKYREELS_IMAGE if self.takes_image else SHIFT_SKYREELS
            return shift, f"; SkyReels' examples take {shift:g}"
        if self.config.height * self.config.width < PIXELS_720P:
            return 0.0, ""
        return SHIFT_720P, f", which is for 480p; Wan's authors advise {SHIFT_720P:g} at 720p"

    def original_name(self, name: str) -> str | None:
        """Map `blocks.0.attn2.to_q.lora_A.weight` to `blocks.0.cross_attn.q.lora_A.weight`."""
        original = name
        for ours, theirs in _ORIGINAL:
            original = original.replace(ours, theirs)
        return original if name.startswith("blocks.") and original != name else None


_ORIGINAL = (  # diffusers' names of Wan's layers -> those of the released checkpoints
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_out.0.", ".o."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".add_k_proj.", ".k_img."),
    (".add_v_proj.", ".v_img."),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
)
