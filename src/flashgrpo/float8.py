"""Linear layers in float8 for the deterministic steps.

The frozen weights of the network's blocks are rounded to e4m3 once, with a scale for each output channel; what goes
into a layer is rounded at each call, with a scale for each row. Such a product has twice the rate of bfloat16 on GPUs
from Ada and Hopper on; a CPU has no units for it, and is slower so. Adapters, attention, norms and embeddings compute
as before, and so does the layer itself outside of this: it is the one that computes the step that is trained.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from flashgrpo.errors import UserError

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
SIDE = 16  # the kernels take matrices whose sides are multiples of it


class Float8:
    """The frozen linear layers of a network's blocks, each with its weights in float8 besides.

    Raises:
        UserError: it has no frozen layers that float8 could take, or torch or the device has no such product.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        if not hasattr(nn.functional, "scaled_mm"):
            raise UserError("rollout.deterministic_dtype: float8 needs torch 2.10 or newer; take bfloat16")
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            raise UserError("rollout.deterministic_dtype: this GPU has no units for float8; take bfloat16")
        self._layers: list[tuple[Any, _Rounded]] = [(layer, _Rounded(layer)) for layer in frozen_layers(blocks)]
        if not self._layers:
            raise UserError(
                "rollout.deterministic_dtype: float8 takes frozen linear layers, and there are none; take bfloat16"
            )

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside of it the layers compute in float8, and give bfloat16 as they would under autocast."""
        for layer, rounded in self._layers:
            layer.forward = rounded
        try:
            yield
        finally:
            for layer, _ in self._layers:
                del layer.forward


class _Rounded:
    """What a linear layer computes, in float8."""

    def __init__(self, layer: nn.Linear) -> None:
        self.weight, scale = rounded(layer.weight.detach())
        self.scale, self._bias = scale.t(), layer.bias

    def __call__(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows out"]:
        by_row = torch.nn.functional.ScalingType.RowWise
        flat, scale = rounded(x.flatten(0, -2))
        y = torch.nn.functional.scaled_mm(
            flat, self.weight.t(), scale, by_row, self.scale, by_row, output_dtype=torch.bfloat16
        )
        y = y.unflatten(0, x.shape[:-1])
        return y if self._bias is None else y + self._bias.to(y.dtype)


def rounded(rows: Float[Tensor, "rows width"]) -> tuple[Float[Tensor, "rows width"], Float32[Tensor, "rows 1"]]:
    """Rows in e4m3, each divided by its scale, and the scales: the largest of a row becomes the largest there is."""
    scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (rows / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def frozen_layers(blocks: Sequence[nn.Module]) -> list[nn.Linear]:
    """Linear layers inside of the blocks whose weights float8 can take: not the adapters' own."""
    linear = [part for block in blocks for part in block.modules() if type(part) is nn.Linear]
    sides = [max(layer.in_features % SIDE, layer.out_features % SIDE) for layer in linear]
    return [one for one, odd in zip(linear, sides, strict=True) if not one.weight.requires_grad and not odd]
