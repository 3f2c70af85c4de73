"""A tiny pipeline with random weights of every supported kind, saved as a checkpoint's folder.

To put a new family under the conformance tests, add a function that builds its pipeline, and a line in `KINDS`.
Those of images are in `image_families.py`.
"""

from typing import Any

import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.image_families import IMAGES
from tests.kind import Kind
from tests.video_families import VIDEOS
from tools.tiny.architecture import make_tokenizer

WIDTH = 24  # of a text's embedding
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def _text_encoder(config: type, encoder: type) -> Any:
    sizes = {"d_model": WIDTH, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1, "dropout_rate": 0.0}
    return encoder(config(vocab_size=len(make_tokenizer()), **sizes))


def _wan_transformer(channels: int, seed: int, network: type = WanTransformer3DModel, **settings: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "freq_dim": 16}
    return network(in_channels=channels, out_channels=16, text_dim=WIDTH, rope_max_seq_len=32, **sizes, **settings)


def _wan_parts(**vae: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return {
        "tokenizer": make_tokenizer(),
        "text_encoder": _text_encoder(UMT5Config, UMT5EncoderModel),
        "vae": AutoencoderKLWan(temperal_downsample=[False, True, True], **sizes, **vae),
        "scheduler": UniPCMultistepScheduler(**UNIPC),
    }


def _clip_parts() -> dict[str, Any]:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=1
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return {"image_encoder": CLIPVisionModel(vision), "image_processor": processor}


def wan21() -> WanPipeline:
    """Wan 2.1 text to video."""
    return WanPipeline(transformer=_wan_transformer(16, 1), **_wan_parts())


def wan21_image() -> WanImageToVideoPipeline:
    """Wan 2.1 image to video: CLIP and further channels."""
    transformer = _wan_transformer(36, 1, image_dim=16, added_kv_proj_dim=24)
    return WanImageToVideoPipeline(transformer=transformer, **_clip_parts(), **_wan_parts())


def wan21_both() -> WanImageToVideoPipeline:
    """Wan 2.1 from a first frame to a last one: CLIP looks at both."""
    settings = {"image_dim": 16, "added_kv_proj_dim": 24, "pos_embed_seq_len": 514}
    pipeline = WanImageToVideoPipeline(transformer=_wan_transformer(36, 1, **settings), **_clip_parts(), **_wan_parts())
    torch.nn.init.normal_(pipeline.transformer.condition_embedder.image_embedder.pos_embed)  # else it tells nothing
    return pipeline


def wan22_small() -> WanPipeline:
    """Wan 2.2 TI2V-5B: a timestep for each token, an autoencoder of its own."""
    vae = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    return WanPipeline(transformer=_wan_transformer(16, 1), expand_timesteps=True, **_wan_parts(**vae))


def wan22_experts() -> WanPipeline:
    """Wan 2.2 T2V-A14B: two experts."""
    experts = {"transformer": _wan_transformer(16, 1), "transformer_2": _wan_transformer(16, 2)}
    return WanPipeline(**experts, boundary_ratio=0.875, **_wan_parts())


def wan22_experts_image() -> WanImageToVideoPipeline:
    """Wan 2.2 I2V-A14B: two experts, further channels, no CLIP."""
    experts = {"transformer": _wan_transformer(36, 1), "transformer_2": _wan_transformer(36, 2)}
    return WanImageToVideoPipeline(**experts, boundary_ratio=0.9, **_wan_parts())


def skyreels() -> SkyReelsV2Pipeline:
    """SkyReels-V2 text to video."""
    return SkyReelsV2Pipeline(transformer=_wan_transformer(16, 1, SkyReelsV2Transformer3DModel), **_wan_parts())


def skyreels_image() -> SkyReelsV2ImageToVideoPipeline:
    """SkyReels-V2 image to video: CLIP and further channels."""
    settings = {"image_dim": 16, "added_kv_proj_dim": 24}
    return SkyReelsV2ImageToVideoPipeline(
        transformer=_wan_transformer(36, 1, SkyReelsV2Transformer3DModel, **settings), **_clip_parts(), **_wan_parts()
    )


def ltx() -> LTXPipeline:
    """LTX-Video."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    layers = {"layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1)}
    return LTXPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=_text_encoder(T5Config, T5EncoderModel),
        vae=AutoencoderKLLTXVideo(latent_channels=8, **blocks, **layers),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=WIDTH,
        ),
    )


def any_flow() -> AnyFlowFARPipeline:
    """AnyFlow-FAR, which streams."""
    torch.manual_seed(1)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "num_layers": 2, "freq_dim": 16}
    transformer = AnyFlowFARTransformer3DModel(
        in_channels=16, out_channels=16, text_dim=WIDTH, rope_max_seq_len=64, **sizes
    )
    scheduler = FlowMapEulerDiscreteScheduler(shift=3.0)
    return AnyFlowFARPipeline(transformer=transformer, **{**_wan_parts(), "scheduler": scheduler})


ANY_FLOW = Kind(any_flow, width=64, num_frames=61)
KINDS = {
    "wan21": Kind(wan21),
    "wan21-image": Kind(wan21_image, takes_image=True, model={"max_sequence_length": 512}),
    "wan21-both": Kind(wan21_both, takes_image=True, last_image=True, model={"max_sequence_length": 512}),
    "wan22-5b": Kind(wan22_small, width=64),
    "wan22-5b-image": Kind(wan22_small, width=64, takes_image=True, model={"from_image": True}),
    "wan22-a14b": Kind(wan22_experts, guidance_scale_2=3.0),
    "wan22-a14b-image": Kind(wan22_experts_image, takes_image=True, guidance_scale_2=3.0),
    "skyreels": Kind(skyreels),
    "skyreels-image": Kind(skyreels_image, takes_image=True, model={"max_sequence_length": 512}),
    "ltx": Kind(
        ltx,
        width=64,
        dynamic=True,
        call=lambda model: {"frame_rate": model.config.fps},
        to_pipeline=lambda model, x: {"latents": model.pipeline._pack_latents(x)},
        from_pipeline=lambda model, made: model.pipeline._unpack_latents(made[0], *model.latent_shape[1:]),
    ),
    **IMAGES,
    **VIDEOS,
}
