"""A safetensors file in parts, so that large tensors are sent from where they lie."""

import json
import struct
from collections.abc import Mapping

import torch
from torch import Tensor


def laid_out(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """Lay out a safetensors file in parts that stay where they are; `safetensors.torch.save` copies them twice."""
    layout, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        dtype = "U8" if tensor.dtype == torch.uint8 else "F32"
        layout[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(layout).encode()
    text += b" " * (-len(text) % 8)  # so that floats are aligned
    payloads = (tensor.numpy().data.cast("B") for tensor in tensors.values())
    return [memoryview(struct.pack("<Q", len(text)) + text), *payloads]
