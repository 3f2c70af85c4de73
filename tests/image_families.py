"""Tiny pipelines of images with random weights; see `families.py`."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
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


def flux(embedded: bool = True, pipeline: type = FluxPipeline) -> Any:
    """FLUX.1-dev, which is fed its guidance scale, or schnell, which has none, or Kontext, which sees a picture."""
    torch.manual_seed(0)
    return pipeline(
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


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """One that can be asked for a chat, which is the bare text."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


LANGUAGE = {
    "vocab_size": len(make_tokenizer()),
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def klein(is_distilled: bool = False) -> Flux2KleinPipeline:
    """FLUX.2 klein, base or distilled; three layers of its encoder are read, the last of them the 27th."""
    torch.manual_seed(0)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4),
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=4,
        ),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=28, head_dim=4, **LANGUAGE)),
        tokenizer=chat_tokenizer(),
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=8,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        is_distilled=is_distilled,
    )


def klein_latents(model: Any, made: Any) -> torch.Tensor:
    """Latents of what FLUX.2 returns, which is ready for its decoder."""
    vae = model.pipeline.vae
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    planes = torch.nn.functional.pixel_unshuffle(made[0], 2)
    return ((planes - vae.bn.running_mean.view(1, -1, 1, 1)) / std)[:, :, None]


def qwen() -> QwenImagePipeline:
    """Qwen-Image; its encoder's half that looks at pictures is as small as it can be."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0]}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 8}
    text = {**LANGUAGE, "num_hidden_layers": 2, "rope_scaling": rope}
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**BY_RESOLUTION, shift_terminal=0.02),
        vae=AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.0, 2.0, 0.5, 1.5],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=make_tokenizer(),
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def z_image() -> ZImagePipeline:
    """Z-Image."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=(4, 4, 8),
        axes_lens=(128, 32, 32),
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # empty memory until they are loaded
        torch.nn.init.normal_(token)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**BY_RESOLUTION),
        vae=vae(4),
        text_encoder=Qwen3Model(Qwen3Config(num_hidden_layers=2, head_dim=4, **LANGUAGE)),
        tokenizer=chat_tokenizer(),
        transformer=transformer,
    )


def sana() -> SanaPipeline:
    """Sana."""
    torch.manual_seed(0)
    side = {"block_out_channels": (4, 8), "layers_per_block": (1, 1), "block_types": "ResBlock"}
    sides = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in side.items()}
    return SanaPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=Gemma2Model(Gemma2Config(num_hidden_layers=1, head_dim=4, **LANGUAGE)),
        vae=AutoencoderDC(
            latent_channels=4, encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), **sides
        ),
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=8,
            mlp_ratio=2,
            sample_size=16,
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
        ),
    )


def image(build: Callable[[], Any], **settings: Any) -> Kind:
    """A kind that makes pictures, 16 x 24 pixels."""
    frame = {
        "to_pipeline": lambda model, x: {"latents": x[:, :, 0]},
        "from_pipeline": lambda model, made: made[0][:, :, None],
    }
    size = {"height": 16, "width": 24, "num_frames": 1}
    return Kind(build, **{**size, "comfyui": False, **frame, **settings})


def packed(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Latents as FLUX and Qwen-Image take them."""
    return {"latents": model.pipeline._pack_latents(x[:, :, 0], len(x), x.shape[1], *x.shape[-2:])}


def unpacked(model: Any, made: Any) -> torch.Tensor:
    """Latents of what FLUX and Qwen-Image return."""
    scale, shape = model.pipeline.vae_scale_factor, model.latent_shape
    planes = model.pipeline._unpack_latents(made[0], shape[-2] * scale, shape[-1] * scale, scale)
    return planes.view(len(planes), *shape)


PACKED: dict[str, Any] = {"to_pipeline": packed, "from_pipeline": unpacked}

IMAGES = {
    "sd35": image(sd35),
    "flux1-dev": image(flux, dynamic=True, linear=False, **PACKED),
    "flux1-schnell": image(lambda: flux(embedded=False), guided=False, linear=False, **PACKED),
    "flux1-kontext": image(
        lambda: flux(pipeline=FluxKontextPipeline),
        dynamic=True,
        linear=False,
        takes_image=True,
        call=lambda model: {"max_area": 16 * 24, "_auto_resize": False},
        **PACKED,
    ),
    "flux2-klein": image(klein, dynamic=True, from_pipeline=klein_latents),
    "qwen-image": image(
        qwen,
        dynamic=True,
        linear=False,
        comfyui=True,
        call=lambda model: {"true_cfg_scale": 4.0, "guidance_scale": None},
        model={"max_sequence_length": 48},
        **PACKED,
    ),
    "z-image": image(z_image, dynamic=True, unipc=False, comfyui=True, call=lambda model: {"guidance_scale": 3.0}),
    "sana": image(sana, height=32, width=64, call=lambda model: {"use_resolution_binning": False}),
}
