"""The decoder of videos in codes (Cosmos-3D with finite scalar quantization) of URSA's checkpoints of videos.

A code is a digit of each of six dimensions; convolutions are causal in time, factorized into space and time, and a
wavelet transform undoes the patches. The names of its weights are URSA's; the encoder is not loaded.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_cosmos import CosmosUnpatcher3d
from torch import Tensor, nn
from torch.nn import functional

from flashgrpo.models.ursa.decoder import Codes, Pictures

DEFAULTS: Mapping[str, Any] = {
    "_class_name": "AutoencoderVQCosmos3D",
    "_quantizer_name": "FSQuantizer",
    "out_channels": 3,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "num_vq_embeddings": 64_000,
    "vq_embed_dim": 6,
    "sample_frames": 17,
    "patch_size": 4,
    "temporal_stride": 4,
    "spatial_stride": 8,
}
"""What a checkpoint means that leaves them out."""
LEVELS = (8, 8, 8, 5, 5, 5)
"""Digits of each dimension of a code, the first the fastest; their product is 64,000."""


class CosmosDecoder(nn.Module):
    """Decodes codes to videos.

    Attributes:
        frames: of codes, that it decodes at once at most.

    Args:
        settings: of the checkpoint's `vae/config.json`, completed by `DEFAULTS`.
        levels: of the digits of a code.
    """

    def __init__(self, settings: Mapping[str, Any], levels: Sequence[int] = LEVELS) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.frames = (settings["sample_frames"] - 1) // settings["temporal_stride"] + 1
        self.post_quant_conv = CausalConv(len(self.levels), settings["latent_channels"], (1, 1, 1))
        self.decoder = Decoder(settings)

    def latents(self, codes: Codes) -> Tensor:
        """Return the digits of codes in [-1, 1], (B, levels, F, h, w)."""
        digits, rest = [], codes
        for level in self.levels:
            digits.append((rest % level - level // 2) / (level // 2))
            rest = rest // level
        return torch.stack(digits, dim=1).to(self.post_quant_conv.weight)

    def forward(self, codes: Codes) -> Pictures:
        """Return videos in [-1, 1], which rounding may leave."""
        videos: Tensor = self.decoder(self.post_quant_conv(self.latents(codes)))
        return videos.transpose(1, 2)


class CausalConv(nn.Conv3d):
    """A convolution of stride 1 that sees a frame and those before it; the first stands for what is before it."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(inputs, outputs, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, F, H, W)."""
        before = self.kernel_size[0] - 1
        return super().forward(functional.pad(x, (0, 0, 0, 0, before, 0), mode="replicate") if before else x)


def factorized(inputs: int, outputs: int) -> nn.Sequential:
    """Make a convolution of space, and one of time behind it."""
    return nn.Sequential(CausalConv(inputs, outputs, (1, 3, 3)), CausalConv(outputs, outputs, (3, 1, 1)))


class FrameNorm(nn.GroupNorm):
    """Normalise each frame by itself, over all of its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, F, H, W)."""
        frames = super().forward(x.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class Resnet(nn.Module):
    """Two factorized convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(inputs), factorized(inputs, outputs)
        self.norm2, self.conv2 = FrameNorm(outputs), factorized(outputs, outputs)
        self.conv_shortcut = CausalConv(inputs, outputs, (1, 1, 1)) if outputs != inputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, C, F, H, W)."""
        y = self.conv1(functional.silu(self.norm1(x)))
        return self.conv2(functional.silu(self.norm2(y))) + self.conv_shortcut(x)


class Attention(nn.Module):
    """Attention of one head, within a frame or, `over_time`, of a place with itself in all frames."""

    def __init__(self, channels: int, over_time: bool) -> None:
        super().__init__()
        self.over_time = over_time
        self.group_norm = FrameNorm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, C, F, H, W)."""
        order = (0, 3, 4, 2, 1) if self.over_time else (0, 2, 3, 4, 1)
        y = self.group_norm(x).permute(order)
        rows = y.flatten(0, 2) if self.over_time else y.flatten(2, 3).flatten(0, 1)
        q, k, v = (layer(rows)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        out = self.to_out[0](functional.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + out.view(y.shape).permute([order.index(axis) for axis in range(5)])


class Upsample(nn.Module):
    """Twice as many frames, twice as many rows and columns, both or neither."""

    def __init__(self, channels: int, space: bool, time: bool) -> None:
        super().__init__()
        self.space, self.time = space, time
        self.conv1 = CausalConv(channels, channels, (3, 1, 1)) if time else nn.Identity()
        self.conv2 = CausalConv(channels, channels, (1, 3, 3)) if space or time else nn.Identity()
        self.conv3 = CausalConv(channels, channels, (1, 1, 1)) if space or time else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, C, F, H, W); of F frames 2 F - 1 are made."""
        if self.time:
            x = x.repeat_interleave(2, dim=2)[:, :, 1:]
            x = self.conv1(x) + x
        if self.space:
            x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            x = self.conv2(x) + x
        return self.conv3(x)


class Block(nn.Module):
    """Resnets, and what makes their result larger."""

    def __init__(self, inputs: int, outputs: int, count: int, upsample: tuple[bool, bool] | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(outputs if number else inputs, outputs) for number in range(count))
        self.upsamplers = nn.ModuleList([Upsample(outputs, *upsample)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, C, F, H, W)."""
        for part in (*self.resnets, *self.upsamplers):
            x = part(x)
        return x


class Middle(nn.Module):
    """A resnet, attention in space and in time, and a resnet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(channels, channels) for _ in range(2))
        both = nn.Sequential(Attention(channels, over_time=False), Attention(channels, over_time=True))
        self.attentions = nn.ModuleList([both])

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, C, F, H, W)."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Decoder(nn.Module):
    """From latents to pixels."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        widths, patch = tuple(reversed(settings["block_out_channels"])), settings["patch_size"]
        space, time = (int(math.log2(settings[f"{name}_stride"] // patch)) for name in ("spatial", "temporal"))
        self.conv_in = factorized(settings["latent_channels"], widths[0])
        self.mid_block = Middle(widths[0])
        blocks = []
        for number, width in enumerate(widths[:-1]):
            in_time = 0 < number <= time
            in_space = in_time or (number < space and space > time)
            upsample = (in_space, in_time) if number < len(widths) - 2 else None
            blocks.append(Block(widths[max(number - 1, 0)], width, settings["layers_per_block"] + 1, upsample))
        self.up_blocks = nn.ModuleList(blocks)
        self.conv_norm_out = FrameNorm(widths[-2])
        self.conv_out = factorized(widths[-2], settings["out_channels"] * patch**3)
        self.unpatch = CosmosUnpatcher3d(patch, "haar")

    def forward(self, x: Tensor) -> Tensor:
        """Compute videos of latents (B, C, F, h, w)."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        pixels: Tensor = self.unpatch(self.conv_out(functional.silu(self.conv_norm_out(x))))
        return pixels
