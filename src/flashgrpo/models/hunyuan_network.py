"""The forward of HunyuanVideo-1.5's network without asking what is in a tensor, and its autoencoder's mask at once."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

TEXT, GLYPHS, IMAGE = 0, 1, 2
"""What a token of the context is of, as the network numbers them."""
States = Float[Tensor, "batch _ _"]
Mask = Int[Tensor, "batch _"]
Video = Float[Tensor, "batch _ frames height width"]


def joint_forward(
    network: Any,
    x: Video,
    timestep: Float[Tensor, " batch"],
    texts: Sequence[tuple[States, Mask]],
    image: States | None = None,
) -> Video:
    """Compute what `HunyuanVideo15Transformer3DModel.forward` does, without asking what is in a tensor.

    That one looks whether an image is all zeros, and sorts the tokens of the context, those that count first: each a
    wait for the device in every call, and nothing that could be counted without values. Tokens of the context have no
    position, and attention leaves out those that do not count, so neither their order nor their number matters.

    Args:
        x: latents (B, C', F, H, W) with the channels of a frame that is given.
        texts: states of Qwen2.5-VL and of ByT5, each with its mask.
        image: states of SigLIP; None without a first frame.
    """
    (text, text_mask), (glyphs, glyph_mask) = texts
    context = [(network.context_embedder(text, timestep, text_mask), text_mask, TEXT)]
    context.append((network.context_embedder_2(glyphs), glyph_mask, GLYPHS))
    if image is not None:
        seen = network.image_embedder(image)
        context.append((seen, torch.ones_like(seen[..., 0], dtype=text_mask.dtype), IMAGE))
    kinds = [torch.full((1, 1), kind, device=x.device) for _, _, kind in context]
    states = torch.cat([own + network.cond_type_embed(k) for (own, _, _), k in zip(context, kinds, strict=True)], dim=1)
    mask = torch.cat([own for _, own, _ in context], dim=1).bool()
    embedded, rope = network.time_embed(timestep), network.rope(x)
    hidden = network.x_embedder(x)
    again = torch.is_grad_enabled() and network.gradient_checkpointing
    for block in network.transformer_blocks:
        given = hidden, states, embedded, mask, rope
        hidden, states = network._gradient_checkpointing_func(block, *given) if again else block(*given)
    tokens = network.proj_out(network.norm_out(hidden, embedded))
    patches = network.config.patch_size_t, network.config.patch_size, network.config.patch_size
    sides = [side // patch for side, patch in zip(x.shape[2:], patches, strict=True)]
    whole: Video = tokens.unflatten(1, sides).unflatten(-1, (-1, *patches)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return whole.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def masked_at_once(vae: Any) -> Any:
    """Return the autoencoder, whose attention now makes its mask in one operation.

    diffusers writes it a row at a time, in every call: thousands of operations for each tile of a video.
    """
    for module in vae.modules():
        if hasattr(module, "prepare_causal_attention_mask"):
            module.prepare_causal_attention_mask = causal_mask
    return vae


def causal_mask(
    n_frame: int, n_hw: int, dtype: torch.dtype, device: torch.device, batch_size: int | None = None
) -> Tensor:
    """Return what is added to scores (L, L), L = `n_frame` x `n_hw`: -inf where a place looks at a later frame.

    Args:
        batch_size: of a mask (batch, L, L) where given.
    """
    frames = torch.full((n_frame, n_frame), float("-inf"), dtype=dtype, device=device).triu(1)
    places = frames[:, None, :, None].expand(-1, n_hw, -1, n_hw).reshape(n_frame * n_hw, -1)
    return places if batch_size is None else places.expand(batch_size, -1, -1)
