"""What the bundled pipeline is made of: the parts of Wan 2.1 and 2.2 with tiny widths, not trained yet."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from flashgrpo.rewards.shapes import ATTRIBUTES

TEXT_LENGTH = 16
"""Tokens that a caption is padded to, the ``max_sequence_length`` to call the pipeline with."""
FLOW_SHIFT = 3.0
LATENT_CHANNELS = 16


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the world. Every text ends in ``</s>``, so the empty prompt is one token long."""
    words = ["<pad>", "</s>", "<unk>", "a", "moving", *(word for known in ATTRIBUTES.values() for word in known)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def make_pipeline(seed: int) -> WanPipeline:
    """The untrained pipeline: 8x spatial and 4x temporal compression, 27 transformer tokens for 9 frames of 48 x 48."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=20,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        is_residual=True,
        temperal_downsample=[True, True],
        in_channels=12,  # the pixel-unshuffle by 2 and the shortcuts of Wan 2.2 spare full-resolution convolutions
        out_channels=12,
        patch_size=2,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
    )
    tokenizer = make_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=1, dropout_rate=0.0
        )
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=64,
        freq_dim=64,
        ffn_dim=512,
        num_layers=6,
        rope_max_seq_len=64,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
    )
    return WanPipeline(tokenizer, text_encoder, vae, scheduler, transformer)
