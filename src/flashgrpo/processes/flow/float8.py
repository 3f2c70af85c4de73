"""Linear layers in float8 for the deterministic steps.

The frozen weights of the network's blocks are rounded to e4m3 once, with a scale for each output channel; what goes
into a layer is rounded at each call, with a scale for each row. GPUs from Ada and Hopper on have units for such
products; rounding takes part of the gain, or all of it in narrow layers, unless `model.compile` fuses it. A CPU is
slower so. Adapters, attention, norms and embeddings compute as before, and so does the layer itself outside of this:
it is the one that computes the step that is trained.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flashgrpo.errors import UserError

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
WEIGHT, SCALE = "float8_weight", "float8_scale"  # buffers of a layer
SIDE = 16  # the kernels take matrices whose sides are multiples of it


class Float8:
    """The frozen linear layers of a network's blocks, each with its weights in float8 besides.

    Raises:
        UserError: it has no frozen layers that float8 could take.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._layers = frozen_layers(blocks)
        if not self._layers:
            raise UserError(
                "rollout.deterministic_dtype: float8 takes frozen linear layers, and there are none; take bfloat16"
            )
        for layer in self._layers:
            weight, scale = rounded(layer.weight.detach())
            layer.register_buffer(WEIGHT, weight, persistent=False)
            layer.register_buffer(SCALE, scale.t(), persistent=False)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside of it the layers compute in float8, and give bfloat16 as they would under autocast."""
        for layer in self._layers:
            layer.__class__ = _Float8Linear  # a class, so that compiled blocks are compiled once for all layers
        try:
            yield
        finally:
            for layer in self._layers:
                layer.__class__ = nn.Linear


class _Float8Linear(nn.Linear):
    """What a linear layer is inside of the context; traced by the compiler, which knows no shapes in annotations."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., width) -> (..., out) in bfloat16."""
        by_row = torch.nn.functional.ScalingType.RowWise
        weight, scale_of_weight = self.get_buffer(WEIGHT), self.get_buffer(SCALE)
        flat, scale = rounded(input.flatten(0, -2).to(torch.bfloat16))
        scales, product = (scale, by_row, scale_of_weight, by_row), torch.nn.functional.scaled_mm
        y = product(flat, weight.t(), *scales, output_dtype=torch.bfloat16, use_fast_accum=True)
        y = y.unflatten(0, input.shape[:-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)


def check_float8(device: torch.device) -> None:
    """Raises a `UserError` where torch or the device has no products in float8."""
    if not hasattr(nn.functional, "scaled_mm"):
        raise UserError("rollout.deterministic_dtype: float8 needs torch 2.10 or newer; take bfloat16")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError("rollout.deterministic_dtype: this GPU has no units for float8; take bfloat16")


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (R, width) in e4m3, each divided by its scale, and the scales (R, 1) in float32.

    The largest of a row becomes the largest number there is.
    """
    largest = torch.linalg.vector_norm(rows, float("inf"), dim=1, keepdim=True)
    scale = largest.clamp(min=1e-12) / LARGEST  # of the rows' own type, as are the passes over them: half the bytes
    return (rows / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale.float()


def frozen_layers(blocks: Sequence[nn.Module]) -> list[nn.Linear]:
    """Linear layers inside of the blocks whose weights float8 can take: not the adapters' own."""
    linear = [part for block in blocks for part in block.modules() if type(part) is nn.Linear]
    sides = [max(layer.in_features % SIDE, layer.out_features % SIDE) for layer in linear]
    return [one for one, odd in zip(linear, sides, strict=True) if not one.weight.requires_grad and not odd]
