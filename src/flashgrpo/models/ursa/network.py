"""URSA's network: transformers' Qwen3 whose tokens all see each other, at places in three axes, and a head of codes.

A sequence is [text, padded on its left | BOV | codes], with nothing masked: padding is seen, too. The logits of a code
are read one place before it, those of the first at BOV. Places are (frame, row, column): (p, p, p) in the text of P
tokens, (P, P, P) at BOV, and (P + 1 + frame, row, column) of the codes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3PreTrainedModel

from flashgrpo.processes.tokens.model import Read

SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
)
"""What Qwen3's settings and URSA's have in common."""


class ThreeAxisRope(nn.Module):
    """Rotary embedding of places in three axes.

    Of the dim / 2 frequencies the first 3 (dim // 8) belong to frame, row and column in turn, the rest to row and
    column. At (p, p, p) it is Qwen3's own.
    """

    def __init__(self, dim: int, base: float) -> None:
        super().__init__()
        both = (dim // 2 - 3 * (dim // 8)) // 2
        axes = torch.tensor([0, 1, 2] * (dim // 8) + [1, 2] * both)
        frequencies = 1 / base ** (torch.arange(0, dim, 2).float() / dim)
        self.register_buffer("axes", axes, persistent=False)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.axes: Tensor
        self.frequencies: Tensor

    def forward(
        self, x: Tensor, position_ids: Int64[Tensor, "1 length 3"]
    ) -> tuple[Float[Tensor, "1 length dim"], Float[Tensor, "1 length dim"]]:
        """Return cosines and sines in the dtype of `x`."""
        angles = position_ids[..., self.axes].float() * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class UrsaNetwork(Qwen3PreTrainedModel):
    """The network, with the names of weights that URSA's checkpoints have.

    Args:
        settings: of the checkpoint's `transformer/config.json`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        config = Qwen3Config(**{name: settings[name] for name in SHARED if name in settings}, use_cache=False)
        super().__init__(config)
        self.model = Qwen3Model(config)
        self.model.rotary_emb = ThreeAxisRope(config.head_dim, float(settings["rope_theta"]))
        for layer in self.model.layers:
            layer.self_attn.is_causal = False
        self.lm_head = nn.Linear(config.hidden_size, settings["lm_head_size"], bias=False)
        self.codes_from, self.bov = settings["lm_vocab_size"], settings["bov_token_id"]

    def forward(
        self,
        text: Int64[Tensor, "batch text"],
        codes: Int64[Tensor, "batch codes"],
        places: Int64[Tensor, "1 length 3"],
        read: Read,
    ) -> Tensor:
        """Return what `read` makes of the hidden states that predict codes, and of the head."""
        ids = torch.cat([text, text.new_full((len(text), 1), self.bov), codes + self.codes_from], dim=1)
        nothing_masked = {"full_attention": None}
        hidden = self.model(ids, attention_mask=nothing_masked, position_ids=places, use_cache=False)[0]
        return read(hidden[:, text.shape[1] : -1], self.head)

    def head(self, hidden: Tensor) -> Tensor:
        """Compute logits of codes in float32."""
        return self.lm_head(hidden).float()

    def enable_gradient_checkpointing(self) -> None:
        """Compute a block again in the backward pass; a Qwen3 does so in training mode alone, and has no dropout."""
        enable = getattr(self, "activation_checkpointing_enable", None)  # of transformers 5
        (enable or self.gradient_checkpointing_enable)({"use_reentrant": False})
        self.train()


def places_of(text: int, frames: int, rows: int, columns: int) -> Int64[Tensor, "1 length 3"]:
    """Return the places of a sequence of so many tokens of text, BOV, and codes in a grid."""
    before = torch.arange(text + 1)[:, None].expand(-1, 3)
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns))
    return torch.cat([before, grid + torch.tensor([text + 1, 0, 0])])[None]
