"""Tiny pipelines of images with random weights; see `families.py`."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tests.kind import Kind
from tools.tiny.architecture import make_tokenizer

BY_RESOLUTION = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """One that cuts texts where CLIP does."""
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def clip(encoder: type, width: int) -> Any:
    """CLIP's text encoder."""
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return encoder(CLIPTextConfig(vocab_size=len(make_tokenizer()), projection_dim=width, eos_token_id=1, **sizes))


def t5(width: int) -> T5EncoderModel:
    """T5's encoder."""
    sizes = {"d_model": width, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1, "dropout_rate": 0.0}
    return T5EncoderModel(T5Config(vocab_size=len(make_tokenizer()), **sizes))


def vae(channels: int, **settings: Any) -> AutoencoderKL:
    """The autoencoder of SD3 and FLUX, which makes a side twice as short."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (4, 4), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": channels}
    quant = {"use_quant_conv": False, "use_post_quant_conv": False}
    return AutoencoderKL(**blocks, **sizes, **quant, scaling_factor=1.5, shift_factor=0.06, **settings)


def sd35() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 medium, with a second attention in its first block."""
    torch.manual_seed(0)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            pos_embed_max_size=32,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4),
        text_encoder=clip(CLIPTextModelWithProjection, 8),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection, 8),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(24),
        tokenizer_3=make_tokenizer(),
    )


def flux(embedded: bool = True) -> FluxPipeline:
    """FLUX.1-dev, which is fed its guidance scale, or schnell, which has none."""
    torch.manual_seed(0)
    return FluxPipeline(
        transformer=flux_transformer(embedded),
        scheduler=FlowMatchEulerDiscreteScheduler(**(BY_RESOLUTION if embedded else {})),
        vae=vae(4),
        text_encoder=clip(CLIPTextModel, 8),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(24),
        tokenizer_2=make_tokenizer(),
    )


def flux_transformer(embedded: bool = True) -> FluxTransformer2DModel:
    """One block of two streams and one of a single stream."""
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=8,
        guidance_embeds=embedded,
        axes_dims_rope=(4, 4, 8),
    )


def image(build: Callable[[], Any], **settings: Any) -> Kind:
    """A kind that makes pictures, 16 x 24 pixels."""
    frame = {
        "to_pipeline": lambda pipeline, x: x[:, :, 0],
        "from_pipeline": lambda pipeline, x, shape: x[:, :, None],
    }
    return Kind(build, 16, 24, 1, **{"comfyui": False, **frame, **settings})


def packed(pipeline: Any, x: torch.Tensor) -> torch.Tensor:
    """Latents as FLUX and Qwen-Image take them."""
    return pipeline._pack_latents(x[:, :, 0], len(x), x.shape[1], *x.shape[-2:])


def unpacked(pipeline: Any, x: torch.Tensor, shape: Any) -> torch.Tensor:
    """Latents of what FLUX and Qwen-Image return."""
    scale = pipeline.vae_scale_factor
    return pipeline._unpack_latents(x, shape[-2] * scale, shape[-1] * scale, scale).view(len(x), *shape)


PACKED: dict[str, Any] = {"to_pipeline": packed, "from_pipeline": unpacked}

IMAGES = {
    "sd35": image(sd35),
    "flux1-dev": image(flux, dynamic=True, linear=False, **PACKED),
    "flux1-schnell": image(lambda: flux(embedded=False), guided=False, linear=False, **PACKED),
}
