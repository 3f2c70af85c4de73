"""The network of LLaDA's checkpoints: transformers' own Llama without a causal mask, under other names.

The checkpoints come with code of their own, which is not run: only names differ. They are changed when weights are
read, and changed back when they are written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from flashgrpo.errors import UserError
from flashgrpo.models.architectures import fill, read_settings
from flashgrpo.models.weights import load_tensors, read_safetensors
from flashgrpo.processes.tokens.model import Read

TOP = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
"""LLaDA's names of modules -> Llama's, of the whole and of a block."""
SAME_AS_LLAMA: Mapping[str, Any] = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "weight_tying": False,
    "input_emb_norm": False,
    "attention_layer_norm": False,
    "scale_logits": False,
}
"""What a checkpoint's settings have to say, where they say it, for it to be a Llama."""
LLADA_8B = {
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_sequence_length": 4096,
}
KNOWN = {"GSAI-ML/LLaDA-8B-Base": LLADA_8B, "GSAI-ML/LLaDA-8B-Instruct": LLADA_8B}
"""By hub id: sizes, for random weights without a download."""


@dataclass(frozen=True)
class Sizes:
    """The settings of a checkpoint, as config.json has them.

    Raises:
        UserError: something is missing or of another architecture, or the vocabulary lacks the mask.
    """

    where: str
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name, value in SAME_AS_LLAMA.items():
            if (given := self.settings.get(name, value)) != value:
                raise UserError(f"model.path: {self.where} has {name} {given!r}, which a Llama has not ({value!r})")
        for name in ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "vocab_size", "mask_token_id"):
            if not isinstance(self.settings.get(name), int):
                raise UserError(f"model.path: {self.where} says no {name}, which a LLaDA checkpoint does")
        for name in ("mask_token_id", "eos_token_id"):
            if not 0 <= self.settings.get(name, 0) < self.vocabulary:
                raise UserError(
                    f"model.path: {self.where} has {name} {self.settings[name]}, which its vocabulary of "
                    f"{self.vocabulary} tokens lacks; get its files again"
                )

    @property
    def vocabulary(self) -> int:
        """Tokens with an embedding, and logits of a place."""
        return int(self.settings.get("embedding_size") or self.settings["vocab_size"])

    @cached_property
    def modules(self) -> dict[str, str]:
        """LLaDA's name of each module -> Llama's."""
        found = {f"model.transformer.{own}": llama for own, llama in TOP.items()}
        for block in range(self.settings["n_layers"]):
            for own, llama in BLOCK.items():
                found[f"model.transformer.blocks.{block}.{own}"] = f"model.layers.{block}.{llama}"
        return found

    def llama(self) -> LlamaConfig:
        """Return the same architecture in transformers' words."""
        get = self.settings.get
        words: dict[str, Any] = {
            "vocab_size": self.vocabulary,
            "hidden_size": get("d_model"),
            "intermediate_size": get("mlp_hidden_size"),
            "num_hidden_layers": get("n_layers"),
            "num_attention_heads": get("n_heads"),
            "num_key_value_heads": get("n_kv_heads") or get("n_heads"),
            "max_position_embeddings": get("max_sequence_length", 4096),
            "rms_norm_eps": get("rms_norm_eps", 1e-5),
            "rope_theta": get("rope_theta", 10000.0),
            "use_cache": False,
        }
        return LlamaConfig(**words, tie_word_embeddings=False, attention_bias=False, mlp_bias=False)


class FullAttentionLlama(LlamaForCausalLM):
    """A Llama whose tokens see all others, and that hands its hidden states out."""

    def forward(self, input_ids: Tensor, sees: Tensor, position_ids: Tensor, first: int, read: Read) -> Tensor:
        """Return what `read` makes of the hidden states from token `first` on, and of the head.

        Args:
            input_ids, position_ids: (B, L).
            sees: (B, 1, L, L) which tokens each sees, True or False.
        """
        hidden = self.model(input_ids=input_ids, attention_mask=sees, position_ids=position_ids, use_cache=False)[0]
        return read(hidden[:, first:], lambda some: self.lm_head(some).float())

    def enable_gradient_checkpointing(self) -> None:
        """Compute a block again in the backward pass; a Llama does so in training mode alone, and has no dropout."""
        enable = getattr(self, "activation_checkpointing_enable", None)  # of transformers 5
        (enable or self.gradient_checkpointing_enable)({"use_reentrant": False})
        self.train()


def read_sizes(folder: Path) -> Sizes:
    """Read the settings of a checkpoint's folder.

    Raises:
        UserError: it is no LLaDA checkpoint.
    """
    settings = read_settings(folder / "config.json")
    if settings.get("model_type") != "llada":
        raise UserError(f"model.path: {folder} is no LLaDA checkpoint")
    return Sizes(str(folder), settings)


def weight_files(folder: Path, sizes: Sizes) -> list[Path]:
    """Return the files of a checkpoint's weights.

    Raises:
        UserError: there are none.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"model.path: {sizes.where} has no model.safetensors, and no parts of one")
    return files


def load_llama(sizes: Sizes, folder: Path, dtype: torch.dtype) -> FullAttentionLlama:
    """Load a checkpoint's weights under Llama's names.

    Raises:
        UserError: a file is damaged, or weights are missing or left over.
    """
    what = f"model.path: the network of {sizes.where}"
    stored = read_safetensors(weight_files(folder, sizes), what)
    tensors = {renamed(name, sizes.modules): tensor.to(dtype) for name, tensor in stored.items()}
    network = _empty(sizes)
    load_tensors(network, tensors, what)
    return network


def random_llama(sizes: Sizes, dtype: torch.dtype, empty: bool) -> FullAttentionLlama:
    """Build the network with random weights, the same at every call; an `empty` one has none, on the meta device."""
    network = _empty(sizes)
    fill(network, dtype, empty)
    return network


def renamed(name: str, modules: Mapping[str, str]) -> str:
    """Return a tensor's name with that of its module exchanged; what is not known stays."""
    module, _, kind = name.rpartition(".")
    return f"{modules.get(module, module)}.{kind}"


def _empty(sizes: Sizes) -> FullAttentionLlama:
    with init_empty_weights(include_buffers=False):
        return FullAttentionLlama(sizes.llama())
