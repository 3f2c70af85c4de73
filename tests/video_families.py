"""Tiny pipelines of further families of videos with random weights; see `families.py`."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)
from transformers import (
    ByT5Tokenizer,
    Gemma2Config,
    Gemma2Model,
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
        "vae": AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(32, 32, 32, 32, 32), layers_per_block=1
        ),
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


VIDEOS = {
    "sana-video": Kind(
        sana_video,
        width=64,
        comfyui=False,
        call=lambda model: {"use_resolution_binning": False, "frames": model.config.num_frames},
    ),
    "hunyuan15": Kind(hunyuan, 64, 64, comfyui=False),
    "hunyuan15-image": Kind(hunyuan_image, 64, 64, takes_image=True, comfyui=False),
}
