"""LTX-2, text to video with its sound: one network with two streams of tokens that attend to each other.

A sample stays one tensor: the latents of the video (C, F, H, W) and those of the sound (L, M), laid in one row of
values, so that a step of both is one Gaussian step, at one noise level.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flashgrpo.errors import UserError
from flashgrpo.models.architectures import checked_size
from flashgrpo.models.conditions import Row
from flashgrpo.models.ltx import LtxModel
from flashgrpo.models.pipeline import Size
from flashgrpo.process import PipelineCall
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.seeds import normal
from flashgrpo.types import Condition, Latents, Waves

PLAIN = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
"""Turns off what the pipeline does beside guidance by the text; the same for both streams."""


class Ltx2Model(LtxModel):
    """An `LTX2Pipeline` as a `VideoModel`; a sample is (1, 1, 1, D), D values of video and sound."""

    encoder_names = ("text_encoder", "connectors")
    cached_parts = ("tokenizer", "text_encoder", "connectors")

    # Prompts

    def encode_text(self, text: str) -> Row:
        """Return {"text": (1, L, D), "sound_text": (1, L, D), "mask": (1, L)} with L = `max_sequence_length`.

        Raises:
            UserError: the connectors cannot fill such a length with their registers.
        """
        pipeline, length = self.pipeline, self.config.max_sequence_length
        registers = pipeline.connectors.config.video_connector_num_learnable_registers
        if registers and length % registers:
            nearest = max(1, round(length / registers)) * registers
            raise UserError(
                f"model.max_sequence_length: {length} is no multiple of the {registers} registers that fill up a text; "
                f"the nearest is {nearest}"
            )
        states, mask, *_ = pipeline.encode_prompt(
            [text], do_classifier_free_guidance=False, max_sequence_length=length, device=self.device
        )
        of_video, of_sound, mask = pipeline.connectors(states, mask, padding_side=pipeline.tokenizer.padding_side)
        return {"text": of_video, "sound_text": of_sound, "mask": mask}

    def random_text(self, text: str) -> Row:
        """Return rows as `encode_text` does, of a text that fills all places."""
        network, length = self.source.architecture.of("transformer"), self.config.max_sequence_length
        shared = network.get("caption_channels", 3840) if network.get("use_prompt_embeddings", True) else None
        widths = {"text": shared or network["cross_attention_dim"]}
        widths["sound_text"] = shared or network["audio_cross_attention_dim"]
        rows = {name: normal((1, length, width), self.seed, f"{name}:{text}") for name, width in widths.items()}
        return {**rows, "mask": torch.ones(1, length, dtype=torch.int64)}

    # Latents

    def shape_of_latents(self) -> Size:
        """Return (1, 1, 1, D) for the configured size.

        Raises:
            UserError: the size does not fit, or the video is too short for a sound.
        """
        vae, scale = self.pipeline.vae, self.pipeline.vae.spatial_compression_ratio
        frames = checked_size(self.config, scale * self._patch()[0], vae.temporal_compression_ratio)
        smallest = 2 * scale if vae.config.decoder_spatial_padding_mode == "reflect" else scale
        for name, size in (("height", self.config.height), ("width", self.config.width)):
            if size < smallest:
                raise UserError(f"model.{name}: {size} is too small for the autoencoder; the least is {smallest}")
        self._video = vae.config.latent_channels, frames, self.config.height // scale, self.config.width // scale
        pipeline, sound = self.pipeline, self.pipeline.audio_vae.config
        rate = pipeline.audio_sampling_rate / pipeline.audio_hop_length / pipeline.audio_vae_temporal_compression_ratio
        length = round(self.config.num_frames / self.config.fps * rate)
        if not length:
            raise UserError(
                f"model.num_frames: a video of {self.config.num_frames} frames at {self.config.fps:g} a second is too "
                "short for a sound; take more frames, or a lower model.fps"
            )
        self._mels = sound.mel_bins // pipeline.audio_vae_mel_compression_ratio
        self._sound = length, sound.latent_channels * self._mels
        return 1, 1, 1, math.prod(self._video) + math.prod(self._sound)

    def split(self, x: Latents) -> tuple[Tensor, Tensor]:
        """Return the latents of videos (B, C, F, H, W) and of their sound (B, L, M)."""
        video, sound = x.flatten(1).split([math.prod(self._video), math.prod(self._sound)], dim=1)
        return video.unflatten(1, self._video), sound.unflatten(1, self._sound)

    def join(self, video: Tensor, sound: Tensor) -> Latents:
        """Return what `split` takes apart."""
        return torch.cat([video.flatten(1), sound.flatten(1)], dim=1)[:, None, None, None]

    def tokens(self) -> int:
        """Count the tokens of the video, by which the pipeline shifts both streams."""
        _, frames, height, width = self._video
        patch, patch_frames = self._patch()
        return (frames // patch_frames) * (height // patch) * (width // patch)

    # The network and its decoders

    def mu(self, num_steps: int) -> float | None:
        """Return the shift by the number of tokens, between the ends that this pipeline has for schedulers without."""
        return self.shift_by_tokens(high=2.05, low=0.95, fewest=1024)

    def forward(self, network: nn.Module, x: Latents, point: GridPoint, condition: Condition) -> Tensor:
        """Call the transformer as the pipeline does, on the tokens of both streams at one noise level."""
        pipeline, patch, rows = self.pipeline, self._patch(), condition.tensors
        video, sound = self.split(x)
        timestep = point.timestep.to(x.device, non_blocking=True)
        _, frames, height, width = self._video
        of_video, of_sound = network(
            hidden_states=pipeline._pack_latents(video, *patch).to(self.dtype),
            audio_hidden_states=sound.to(self.dtype),
            encoder_hidden_states=rows["text"].to(self.dtype),
            audio_encoder_hidden_states=rows["sound_text"].to(self.dtype),
            timestep=timestep,
            sigma=timestep,
            encoder_attention_mask=rows["mask"],
            audio_encoder_attention_mask=rows["mask"],
            num_frames=frames,
            height=height,
            width=width,
            fps=self.config.fps,
            audio_num_frames=self._sound[0],
            return_dict=False,
        )
        sides = frames // patch[1], height // patch[0], width // patch[0]
        return self.join(pipeline._unpack_latents(of_video.float(), *sides, *patch), of_sound.float())

    def decode_latents(self, vae: Any, latents: Latents) -> Tensor:
        """Decode the part of the video."""
        return super().decode_latents(vae, self.split(latents)[0])

    @property
    def sample_rate(self) -> int:  # type: ignore[override]
        """Samples a second of the sound."""
        return int(self.pipeline.vocoder.config.output_sampling_rate)

    @torch.no_grad()
    def decode_sound(self, latents: Latents) -> Waves:
        """Decode to spectrograms, and these to waves."""
        decoder: Any = self.part("audio_vae")
        packed = self.split(latents)[1]
        mean, std = decoder.latents_mean.to(packed), decoder.latents_std.to(packed)
        unpacked = self.pipeline._unpack_audio_latents(packed * std + mean, self._sound[0], self._mels)
        spectrograms = decoder.decode(unpacked.to(decoder.dtype), return_dict=False)[0]
        waves: Tensor = self.part("vocoder")(spectrograms)
        return waves.float().clamp(-1, 1)

    def pipeline_call(self, given: Mapping[str, Any]) -> PipelineCall:
        """Return the pipeline with one kind of guidance, of one scale for both streams."""
        scales = {**PLAIN, "guidance_scale": given["guidance_scale"]}
        of_sound = {f"audio_{name}": scale for name, scale in scales.items()}
        call = super().pipeline_call({**given, **scales, **of_sound, "frame_rate": self.config.fps})
        return replace(call, sounds=True)
