"""A checkpoint of URSA that fits on a page: random weights, in a folder as URSA's own code writes one."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flashgrpo.distributed.world import World
from flashgrpo.models.settings import Full, ModelConfig
from flashgrpo.models.ursa.checkpoint import KNOWN, Ursa
from flashgrpo.models.ursa.model import UrsaModel

TEXT, CODES, PLACES = 12, 8, 5  # tokens of text, codes, places of a prompt
TRANSFORMER = {
    "_class_name": "URSATransformer3DModel",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "rope_theta": 1000.0,
    "vocab_size": TEXT + CODES,
    "lm_vocab_size": TEXT,
    "lm_head_size": CODES,
    "bov_token_id": TEXT - 1,
}
VAE = {
    "_class_name": "AutoencoderVQ",
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "num_vq_embeddings": CODES,
    "vq_embed_dim": 4,
    "spatial_stride": 2,
    "attn_up_block": True,
}
SCHEDULER = {"_class_name": "KineticOptimalScheduler", "alpha": 0.9, "c": 3, "shift": 5.0}


def config(path, **settings) -> ModelConfig:
    """Two rows of three codes, 4 x 6 pixels."""
    size = {"height": 4, "width": 6, "num_frames": 1, "max_sequence_length": PLACES}
    return ModelConfig(path=str(path), **{**size, **settings})


def write_checkpoint(folder: Path) -> Path:
    """Write the folder; its weights lie in two files."""
    known = KNOWN["BAAI/URSA-1.7B-IBQ512"]
    settings = Ursa("tiny", {**known.transformer, **TRANSFORMER}, {**known.vae, **VAE}, SCHEDULER)
    model = UrsaModel(settings, None, config("tiny", train=Full()), World(torch.device("cpu")), 0)
    torch.manual_seed(0)
    for parameter in [*model.network.parameters(), *model.decoder.parameters()]:
        parameter.data += 0.2 * torch.randn(parameter.shape)
    for name, content in {"transformer": TRANSFORMER, "vae": VAE, "scheduler": SCHEDULER}.items():
        (folder / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(content))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "URSAPipeline"}))
    weights = model.network.state_dict()
    half = dict(list(weights.items())[:5])
    rest = {name: tensor for name, tensor in weights.items() if name not in half}
    save_file(half, folder / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors")
    save_file(rest, folder / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors")
    vae = {name: tensor.contiguous() for name, tensor in model.decoder.state_dict().items()}
    encoder = {"encoder.conv_in.weight": torch.zeros(1), "quant_conv.weight": torch.zeros(1)}
    save_file({**vae, **encoder}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    torch.save({"path.emb": torch.randn(CODES, 4)}, folder / "scheduler" / "scheduler_model.pth")
    words = {"<pad>": 0, "two": 1, "red": 2, "cells": 3, "<unk>": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder / "tokenizer")
    return folder
