"""Tiny pipelines of further families of videos with random weights; see `families.py`."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import (
    ByT5Tokenizer,
    Gemma2Config,
    Gemma2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.image_families import LANGUAGE
from tests.kind import Kind
from tools.tiny.architecture import make_tokenizer

SCALE = 4.0


def _chatting_tokenizer() -> Any:
    """One whose template puts 108 tokens before the prompt, which HunyuanVideo's pipeline cuts off."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ 'a ' * 108 }}{{ messages[1].content }} a"
    return tokenizer


def _hunyuan_parts(task: str) -> dict[str, Any]:
    torch.manual_seed(0)
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=len(make_tokenizer()),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
    )
    t5 = T5Config(vocab_size=384, d_model=12, d_kv=4, num_heads=2, d_ff=16, num_layers=1, dropout_rate=0.0)
    return {
        "tokenizer": _chatting_tokenizer(),
        "text_encoder": Qwen2_5_VLTextModel(qwen),
        "tokenizer_2": ByT5Tokenizer(),
        "text_encoder_2": T5EncoderModel(t5),
        "vae": AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "guider": ClassifierFreeGuidance(guidance_scale=SCALE),
        "transformer": HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=16,
            text_embed_2_dim=12,
            image_embed_dim=8,
            rope_axes_dim=(4, 6, 6),
            target_size=64,
            task_type=task,
        ),
    }


def hunyuan() -> HunyuanVideo15Pipeline:
    """HunyuanVideo-1.5 text to video."""
    return HunyuanVideo15Pipeline(**_hunyuan_parts("t2v"))


def hunyuan_image() -> HunyuanVideo15ImageToVideoPipeline:
    """HunyuanVideo-1.5 image to video."""
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    return HunyuanVideo15ImageToVideoPipeline(
        **_hunyuan_parts("i2v"),
        image_encoder=SiglipVisionModel(vision),
        feature_extractor=SiglipImageProcessorPil(size={"height": 16, "width": 16}),
    )


def sana_video() -> SanaVideoPipeline:
    """Sana-Video."""
    torch.manual_seed(0)
    return SanaVideoPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=Gemma2Model(Gemma2Config(num_hidden_layers=1, head_dim=4, **LANGUAGE)),
        vae=AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        transformer=SanaVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=8,
            mlp_ratio=2.0,
            rope_max_seq_len=32,
        ),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
    )


def ltx2_start(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Latents as LTX-2's pipeline takes them, which normalises both parts."""
    video, sound = model.split(x)
    vae, decoder = model.pipeline.vae, model.pipeline.audio_vae
    mean, std = (values.view(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
    return {
        "latents": video * std + mean,
        "audio_latents": model.pipeline._unpack_audio_latents(
            sound * decoder.latents_std + decoder.latents_mean, sound.shape[1], 4
        ),
    }


def ltx2_latents(model: Any, made: Any) -> torch.Tensor:
    """Latents of what LTX-2's pipeline returns, which is ready for its decoders."""
    vae, decoder = model.pipeline.vae, model.pipeline.audio_vae
    mean, std = (values.view(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
    sound = model.pipeline._pack_audio_latents(made[1])
    return model.join((made[0] - mean) / std, (sound - decoder.latents_mean) / decoder.latents_std)


def ltx2() -> LTX2Pipeline:
    """LTX-2: a video and its sound."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "attention_head_dim": 8}
    width = LANGUAGE["hidden_size"]
    gemma = Gemma3TextConfig(num_hidden_layers=2, head_dim=4, **LANGUAGE)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    connectors = {
        f"{part}_connector_{name}": value
        for part in ("video", "audio")
        for name, value in {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1}.items()
    }
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(4, 8, 16, 32),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        decoder_causal=False,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    sound = AutoencoderKLLTX2Audio(base_channels=8, latent_channels=2, ch_mult=(1, 2, 2), num_res_blocks=1, mel_bins=16)
    for part in (vae, sound):
        part.latents_mean.normal_()
        part.latents_std.uniform_(0.5, 2.0)
    return LTX2Pipeline(
        tokenizer=make_tokenizer(),
        text_encoder=Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=gemma, vision_config=vision, mm_tokens_per_image=4)
        ),
        connectors=LTX2TextConnectors(
            caption_channels=width,
            text_proj_in_factor=3,
            video_connector_num_learnable_registers=4,
            audio_connector_num_learnable_registers=4,
            **connectors,
        ),
        vae=vae,
        audio_vae=sound,
        vocoder=LTX2Vocoder(
            in_channels=32,
            hidden_channels=16,
            upsample_kernel_sizes=[16, 15],
            upsample_factors=[8, 5],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3]],
            output_sampling_rate=4000,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
        transformer=LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            cross_attention_dim=16,
            audio_in_channels=8,
            audio_out_channels=8,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=2,
            caption_channels=width,
            rope_type="split",
            **heads,
        ),
    )


VIDEOS = {
    "ltx2": Kind(
        ltx2,
        64,
        64,
        dynamic=True,
        call=lambda model: model.pipeline_call({"guidance_scale": SCALE}).arguments,
        to_pipeline=ltx2_start,
        from_pipeline=ltx2_latents,
    ),
    "sana-video": Kind(
        sana_video,
        width=64,
        comfyui=False,
        call=lambda model: {"use_resolution_binning": False, "frames": model.config.num_frames},
    ),
    "hunyuan15": Kind(hunyuan, 64, 64, comfyui=False),
    "hunyuan15-image": Kind(hunyuan_image, 64, 64, takes_image=True, comfyui=False),
}
