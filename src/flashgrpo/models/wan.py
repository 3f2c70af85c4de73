"""Wan 2.1 text-to-video, through diffusers' own classes; the bundled model is one with tiny widths."""

import contextlib
import copy
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
import torch
import transformers
from diffusers import WanPipeline
from jaxtyping import Shaped
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from flashgrpo.config import Lora, ModelConfig
from flashgrpo.distributed import Team
from flashgrpo.errors import UserError
from flashgrpo.models.lora import prepare, trained_parameters, weights_replaced
from flashgrpo.schedule import SigmaGrid, grid_from_scheduler
from flashgrpo.sharding import place
from flashgrpo.types import Condition, Latents, LoraStyle, Videos


class WanModel:
    """A `WanPipeline` as a `VideoModel`. The denoising loop is not the pipeline's; its parts are."""

    def __init__(
        self, pipeline: WanPipeline, config: ModelConfig, team: Team, seed: int, keep_reference: bool = False
    ) -> None:
        self.pipeline = pipeline
        self.config = config
        self.latent_shape = self._latent_shape()
        if (tokens := self._tokens()) % team.context:
            raise UserError(
                f"parallel.context: the {tokens} tokens of such a video cannot be split over {team.context} processes"
            )
        prepare(self.network, config.train, seed)
        if config.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()  # type: ignore[operator]
        self._dtype = getattr(torch, config.compute_dtype) if config.compute_dtype else pipeline.transformer.dtype
        place(self.network, team, self._dtype if config.compute_dtype else None)
        pipeline.text_encoder.requires_grad_(False).to(team.device)
        pipeline.vae.requires_grad_(False).to(team.device)
        self._negative = self._embed([config.negative_prompt])  # (1, L, D), the same for every sample
        self._base = (
            {name: parameter.detach().clone() for name, parameter in trained_parameters(self.network).items()}
            if keep_reference and not isinstance(config.train, Lora)
            else None
        )

    @classmethod
    def load(cls, path: str, config: ModelConfig, team: Team, seed: int, keep_reference: bool = False) -> "WanModel":
        """Load with `WanPipeline.from_pretrained`, the VAE in float32 and the rest in `config.dtype`.

        Raises:
            UserError: a part of the pipeline is missing or unreadable, or the video size does not fit the model.
        """
        dtype = getattr(torch, config.dtype)
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        try:
            pipeline = WanPipeline.from_pretrained(path, dtype={"default": dtype, "vae": torch.float32})
        except Exception as error:  # diffusers, transformers and safetensors each raise their own kinds
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"model.path: {path} could not be loaded as a WanPipeline: {reason}") from error
        if getattr(pipeline, "transformer_2", None) is not None or pipeline.config.expand_timesteps:
            raise UserError(f"model.path: {path} is a Wan 2.2 pipeline; so far only Wan 2.1 text-to-video is supported")
        return cls(pipeline, config, team, seed, keep_reference)

    @property
    def network(self) -> nn.Module:
        """The transformer."""
        return self.pipeline.transformer

    @property
    def device(self) -> torch.device:
        """Of the transformer."""
        return next(self.network.parameters()).device

    def grid(self, num_steps: int) -> SigmaGrid:
        """The grid of the checkpoint's scheduler, with `config.shift` in place of its own where given."""
        return grid_from_scheduler(self.pipeline.scheduler, num_steps, self.config.shift)

    def encode(self, texts: Sequence[str]) -> Condition:
        """Text embeddings {"text": (B, max_sequence_length, D)}."""
        return Condition({"text": self._embed(texts)})

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, with the pipeline's own cleaning left out."""
        return [len(ids) for ids in self.pipeline.tokenizer(list(texts)).input_ids]

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        text, _ = self.pipeline.encode_prompt(
            list(texts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
            device=self.device,
        )
        return text

    def velocity(
        self, x: Latents, timestep: Shaped[Tensor, " batch"], condition: Condition, guidance_scale: float
    ) -> Latents:
        """v_negative + guidance_scale (v_text - v_negative), both branches in one forward; scale 1 needs only one."""
        text = condition.tensors["text"]
        if guidance_scale == 1:
            return self._forward(x, timestep, text)
        negative = self._negative.expand_as(text)
        both = self._forward(torch.cat([x, x]), torch.cat([timestep, timestep]), torch.cat([text, negative]))
        v_text, v_negative = both.chunk(2)
        return v_negative + guidance_scale * (v_text - v_negative)

    def _forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.network(x.to(self._dtype), timestep, text.to(self._dtype), return_dict=False)[0].float()

    def idle(self) -> Tensor:
        """One forward of one row of zeros."""
        x = torch.zeros(1, *self.latent_shape, device=self.device)
        return self._forward(x, torch.zeros(1, device=self.device), self._negative)

    @torch.no_grad()
    def decode(self, latents: Latents) -> Videos:
        """Undo the latents' normalisation, decode, and bring [-1, 1] to [0, 1]."""
        vae = self.pipeline.vae
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        video = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
        return (video.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 1, 3, 4).contiguous()

    def reference(self) -> AbstractContextManager[None]:
        """Adapters off, or the kept base weights."""
        if isinstance(self.config.train, Lora):
            return self._adapters_off()
        assert self._base is not None, "load with keep_reference to compare a fully trained model with its base"
        return weights_replaced(self.network, self._base)

    @contextlib.contextmanager
    def _adapters_off(self):  # type: ignore[no-untyped-def]
        self.network.disable_adapters()  # type: ignore[operator]
        try:
            yield
        finally:
            self.network.enable_adapters()  # type: ignore[operator]

    def save_lora(self, folder: Path, tensors: Mapping[str, Tensor], style: LoraStyle = "diffusers") -> None:
        """Write `folder/pytorch_lora_weights.safetensors`, which `WanPipeline.load_lora_weights` reads in both styles.

        The one of ComfyUI has the original names of Wan's layers and the factor alpha / rank inside of B.
        """
        layers = get_peft_model_state_dict(self.network, state_dict=dict(tensors), adapter_name="default")
        lora: Any = self.network.peft_config["default"]  # type: ignore[index]
        if style == "comfyui":
            folder.mkdir(parents=True, exist_ok=True)
            named = {f"diffusion_model.{_original_name(name)}": tensor for name, tensor in layers.items()}
            scale = lora.lora_alpha / lora.r
            scaled = {name: tensor * scale if ".lora_B." in name else tensor for name, tensor in named.items()}
            whole = {name: tensor.contiguous() for name, tensor in scaled.items()}
            safetensors.torch.save_file(whole, folder / "pytorch_lora_weights.safetensors")
            return
        metadata = copy.copy(lora.to_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            WanPipeline.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata)

    def save_merged(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the pipeline with the adapters added to its weights, or with the fully trained weights."""
        for name, parameter in trained_parameters(self.network).items():
            parameter.data.copy_(tensors[name])
        if isinstance(self.config.train, Lora):
            self.network.fuse_lora()  # type: ignore[operator]
            self.network.unload_lora()  # type: ignore[operator]
        self.pipeline.save_pretrained(folder)

    def _tokens(self) -> int:
        patch_frames, patch_height, patch_width = self.pipeline.transformer.config.patch_size
        _, frames, height, width = self.latent_shape
        return (frames // patch_frames) * (height // patch_height) * (width // patch_width)

    def _latent_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) for the configured video size.

        Raises:
            UserError: the size is no multiple of what VAE and patches need; the sentence names the nearest that is.
        """
        config, vae, network = self.config, self.pipeline.vae.config, self.pipeline.transformer.config
        _, patch_height, patch_width = network.patch_size
        for name, size, multiple in (
            ("height", config.height, vae.scale_factor_spatial * patch_height),
            ("width", config.width, vae.scale_factor_spatial * patch_width),
        ):
            if size % multiple:
                nearest = max(multiple, round(size / multiple) * multiple)
                raise UserError(f"model.{name}: {size} is no multiple of {multiple}; the nearest is {nearest}")
        stride = vae.scale_factor_temporal
        if (config.num_frames - 1) % stride:
            nearest = round((config.num_frames - 1) / stride) * stride + 1
            raise UserError(
                f"model.num_frames: {config.num_frames} is no multiple of {stride} plus 1; the nearest is {nearest}"
            )
        return (
            network.in_channels,
            (config.num_frames - 1) // stride + 1,
            config.height // vae.scale_factor_spatial,
            config.width // vae.scale_factor_spatial,
        )


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


def _original_name(name: str) -> str:
    """`blocks.0.attn2.to_q.lora_A.weight` -> `blocks.0.cross_attn.q.lora_A.weight`.

    Raises:
        UserError: a layer outside of the blocks' attention and feed-forward layers.
    """
    original = name
    for ours, theirs in _ORIGINAL:
        original = original.replace(ours, theirs)
    if not name.startswith("blocks.") or original == name:
        raise UserError(f"--format comfyui: layer {name.split('.lora_')[0]} has no name there; use diffusers or merged")
    return original
