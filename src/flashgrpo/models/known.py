"""Sizes of released checkpoints, as their published configurations have them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashgrpo.models.architectures import Architecture


def _wan(
    family: str,
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any] | None = None,
    experts: int = 1,
    shift: float = 3.0,
    kind: str = "WanTransformer3DModel",
    **settings: Any,
) -> Architecture:
    shared = {"patch_size": (1, 2, 2), "attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256}
    network = (kind, {**shared, **transformer})
    scheduler = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    names = ("transformer", "transformer_2")[:experts]
    components: dict[str, tuple[str, Mapping[str, Any]]] = dict.fromkeys(names, network)
    components["vae"] = ("AutoencoderKLWan", vae or {})
    components["scheduler"] = ("UniPCMultistepScheduler", scheduler)
    return Architecture(family, components, settings)


def _far(transformer: Mapping[str, Any]) -> Architecture:
    """Return AnyFlow-FAR: Wan's widths, and its class's defaults; the shift, Wan's usual one, was not read from it."""
    blocks = {"chunk_partition": (1, 3, 3, 3, 3, 3, 3, 2), "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3}
    wan = _wan("AnyFlowFARPipeline", {**transformer, **blocks}, kind="AnyFlowFARTransformer3DModel")
    return replace(wan, components={**wan.components, "scheduler": ("FlowMapEulerDiscreteScheduler", {"shift": 5.0})})


def _image(
    family: str, transformer: tuple[str, Any], vae: tuple[str, Any], scheduler: Any, **settings: Any
) -> Architecture:
    euler = ("FlowMatchEulerDiscreteScheduler", scheduler)
    return Architecture(family, {"transformer": transformer, "vae": vae, "scheduler": euler}, settings)


def _sd3(transformer: Mapping[str, Any]) -> Architecture:
    network = {
        "in_channels": 16,
        "out_channels": 16,
        "pooled_projection_dim": 2048,
        "qk_norm": "rms_norm",
        **transformer,
    }
    vae = ("AutoencoderKL", {**_VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609})
    return _image("StableDiffusion3Pipeline", ("SD3Transformer2DModel", network), vae, {"shift": 3.0})


def _flux(family: str, guidance_embeds: bool) -> Architecture:
    vae = ("AutoencoderKL", _FLUX_VAE)
    shift = {"shift": 3.0, **_BY_RESOLUTION} if guidance_embeds else {"shift": 1.0}
    return _image(
        family,
        (
            "FluxTransformer2DModel",
            {"guidance_embeds": guidance_embeds, "joint_attention_dim": 4096, "pooled_projection_dim": 768},
        ),
        vae,
        shift,
    )


def _hunyuan(task: str, shift: float, side: int, guidance_scale: float) -> Architecture:
    """Return HunyuanVideo-1.5 as diffusers converts it: but for these four all sizes are those of its classes."""
    family = "HunyuanVideo15ImageToVideoPipeline" if task == "i2v" else "HunyuanVideo15Pipeline"
    network = ("HunyuanVideo15Transformer3DModel", {"target_size": side, "task_type": task})
    known = _image(family, network, ("AutoencoderKLHunyuanVideo15", {}), {"shift": shift})
    guider = ("ClassifierFreeGuidance", {"guidance_scale": guidance_scale})
    return Architecture(family, {**known.components, "guider": guider})


def _klein(is_distilled: bool) -> Architecture:
    network, shift = ("Flux2Transformer2DModel", _KLEIN), {"use_dynamic_shifting": True}
    return _image("Flux2KleinPipeline", network, ("AutoencoderKLFlux2", {}), shift, is_distilled=is_distilled)


_VAE = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_FLUX_VAE = {**_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}
_KLEIN = {
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
_QWEN = {"num_layers": 60, "joint_attention_dim": 3584}
_QWEN_SHIFT = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
_SANA = {"caption_channels": 2304, "in_channels": 32, "out_channels": 32, "sample_size": 32}
_SANA_SIDE = {
    "block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
}
_SANA_VAE = {
    **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _SANA_SIDE.items()},
    "latent_channels": 32,
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
_SANA_VIDEO = {
    "num_layers": 20,
    "num_attention_heads": 20,
    "attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 3.0,
    "sample_size": 30,
    "patch_size": (1, 2, 2),
}
_BY_RESOLUTION = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
_SD35_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "joint_attention_dim": 4096,
}
_SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "attention_head_dim": 64,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "joint_attention_dim": 4096,
}
_WAN_1B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "in_channels": 16, "out_channels": 16}
_WAN_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "in_channels": 16, "out_channels": 16}
_WAN_14B_IMAGE = _WAN_14B | {"in_channels": 36}
_WAN_14B_CLIP = _WAN_14B_IMAGE | {"image_dim": 1280, "added_kv_proj_dim": 5120}
_WAN_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
_SKYREELS = "SkyReelsV2Transformer3DModel"
_WAN22_VAE = {
    "z_dim": 48,
    "base_dim": 160,
    "decoder_base_dim": 256,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
_LTX_SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
_LTX2_VAE = {"decoder_causal": False, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
_LTX = {"in_channels": 128, "out_channels": 128, "num_attention_heads": 32, "num_layers": 28, "caption_channels": 4096}

KNOWN: Mapping[str, Architecture] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan("WanPipeline", _WAN_1B),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan("WanPipeline", _WAN_14B),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _wan("WanImageToVideoPipeline", _WAN_14B_CLIP),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _wan("WanImageToVideoPipeline", _WAN_14B_CLIP, shift=5.0),
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": _wan(
        "WanImageToVideoPipeline", _WAN_14B_CLIP | {"pos_embed_seq_len": 514}, shift=16.0
    ),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _wan("WanPipeline", _WAN_5B, _WAN22_VAE, shift=5.0, expand_timesteps=True),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _wan("WanPipeline", _WAN_14B, experts=2, boundary_ratio=0.875),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": _wan(
        "WanImageToVideoPipeline", _WAN_14B_IMAGE, experts=2, shift=5.0, boundary_ratio=0.9
    ),
    "nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers": _far(_WAN_1B),
    **{
        f"Skywork/SkyReels-V2-{task}-14B-{size}-Diffusers": _wan(family, sizes, shift=1.0, kind=_SKYREELS)
        for task, family, sizes in (
            ("T2V", "SkyReelsV2Pipeline", _WAN_14B),
            ("I2V", "SkyReelsV2ImageToVideoPipeline", _WAN_14B_CLIP),
        )
        for size in ("540P", "720P")
    },
    "Lightricks/LTX-Video": Architecture(
        "LTXPipeline",
        {
            "transformer": ("LTXVideoTransformer3DModel", _LTX),
            "vae": ("AutoencoderKLLTXVideo", {}),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", _LTX_SCHEDULER),
        },
    ),
    "Lightricks/LTX-2": Architecture(  # 2.0, whose sizes are those of diffusers' classes but for its VAE
        "LTX2Pipeline",
        {
            "transformer": ("LTX2VideoTransformer3DModel", {}),
            "vae": ("AutoencoderKLLTX2Video", _LTX2_VAE),
            "audio_vae": ("AutoencoderKLLTX2Audio", {}),
            "vocoder": ("LTX2Vocoder", {}),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", _LTX_SCHEDULER),
        },
    ),
    **{
        f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{side}p_{task}{kind}": _hunyuan(task, shift, *sizes)
        for side, task, shift, kind, sizes in (
            (480, "t2v", 5.0, "", (640, 6.0)),
            (480, "i2v", 5.0, "", (640, 6.0)),
            (720, "t2v", 9.0, "", (960, 6.0)),
            (720, "i2v", 7.0, "", (960, 6.0)),
            (480, "t2v", 5.0, "_distilled", (640, 1.0)),
            (480, "i2v", 5.0, "_distilled", (640, 1.0)),
            (720, "i2v", 7.0, "_distilled", (960, 1.0)),
        )
    },
    "stabilityai/stable-diffusion-3.5-medium": _sd3(_SD35_MEDIUM),
    "stabilityai/stable-diffusion-3.5-large": _sd3(_SD35_LARGE),
    "black-forest-labs/FLUX.1-dev": _flux("FluxPipeline", guidance_embeds=True),
    "black-forest-labs/FLUX.1-schnell": _flux("FluxPipeline", guidance_embeds=False),
    "black-forest-labs/FLUX.1-Kontext-dev": _flux("FluxKontextPipeline", guidance_embeds=True),
    "black-forest-labs/FLUX.2-klein-4B": _klein(is_distilled=True),
    "black-forest-labs/FLUX.2-klein-base-4B": _klein(is_distilled=False),
    "Qwen/Qwen-Image": _image(
        "QwenImagePipeline", ("QwenImageTransformer2DModel", _QWEN), ("AutoencoderKLQwenImage", {}), _QWEN_SHIFT
    ),
    "Tongyi-MAI/Z-Image-Turbo": _image(
        "ZImagePipeline",
        ("ZImageTransformer2DModel", {"cap_feat_dim": 2560}),
        ("AutoencoderKL", _FLUX_VAE),
        {"shift": 3.0},
    ),
    "Efficient-Large-Model/SANA-Video_2B_480p_diffusers": Architecture(
        "SanaVideoPipeline",
        {
            "transformer": ("SanaVideoTransformer3DModel", _SANA_VIDEO),
            "vae": ("AutoencoderKLWan", {}),
            "scheduler": (
                "DPMSolverMultistepScheduler",
                {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0},
            ),
        },
    ),
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": Architecture(
        "SanaPipeline",
        {
            "transformer": ("SanaTransformer2DModel", _SANA),
            "vae": ("AutoencoderDC", _SANA_VAE),
            "scheduler": (
                "DPMSolverMultistepScheduler",
                {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, "solver_order": 2},
            ),
        },
    ),
}
"""By hub id."""
