"""Where the parts of a model are: all on the device, or only the one in use and what is trained."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PIECE = 2**30  # bytes; a power of two, because torch rounds pinned memory up to one
ALIGNMENT = 256  # bytes, as torch aligns what it allocates on a device


@dataclass(frozen=True)
class Piece:
    """Frozen tensors of a part that lie in one piece of the host's memory, pinned where there is a GPU.

    Args:
        memory: (N,) uint8.
        places: parameter and the byte at which it begins.
    """

    memory: Tensor
    places: Sequence[tuple[nn.Parameter, int]]

    def place(self, memory: Tensor) -> None:
        """Let the parameters lie in this memory, which is the piece's own or a copy of it."""
        for parameter, start in self.places:
            parameter.data = values_at(memory, start, parameter)


class Residence:
    """Brings the part that is about to compute to the device and, with `offload`, sends the others off.

    Only frozen tensors move: what is trained, its gradients and the optimizer's state stay. A frozen tensor never
    changes, so its copy in the CPU's memory is kept and nothing has to be copied back. A part lies there in pieces of
    about 1 GiB: pinned tensor by tensor, 56 GB would become 86, and each piece is one copy that nobody waits for.

    Args:
        parts: name -> module.
    """

    def __init__(self, parts: Mapping[str, nn.Module], device: torch.device, offload: bool) -> None:
        self._parts = dict(parts)
        self._device = device
        self._offload = offload
        self._pieces: dict[str, list[Piece]] = {}
        self.present: set[str] = set()
        for name, part in self._parts.items():
            if not offload:
                self.bring(name)
                continue
            part.to("cpu")  # the autoencoder may have encoded images
            for parameter in part.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(device)
            for buffer in part.buffers():
                buffer.data = buffer.data.to(device)
            frozen = [parameter for parameter in part.parameters() if not parameter.requires_grad]
            self._pieces[name] = packed(frozen, device.type == "cuda")

    def bring(self, name: str) -> nn.Module:
        """Return the part, brought to the device."""
        part = self._parts[name]
        if name in self.present:
            return part
        if not self._offload:
            self.present.add(name)
            return part.to(self._device)
        for other in self.present:
            for piece in self._pieces[other]:
                piece.place(piece.memory)
        self.present = {name}
        for piece in self._pieces[name]:
            piece.place(piece.memory.to(self._device, non_blocking=True))
        return part


@torch.no_grad()
def packed(parameters: Iterable[nn.Parameter], pinned: bool, size: int = PIECE) -> list[Piece]:
    """Move parameters into pieces of the host's memory; a tensor larger than a piece gets one of its own.

    Args:
        size: bytes of a piece.
    """
    plans: list[list[tuple[nn.Parameter, int]]] = [[]]
    end = 0
    for parameter in parameters:
        if plans[-1] and end + parameter.nbytes > size:
            plans.append([])
            end = 0
        plans[-1].append((parameter, end))
        end = -(-(end + parameter.nbytes) // ALIGNMENT) * ALIGNMENT
    return [_filled(plan, pinned) for plan in plans if plan]


def _filled(places: Sequence[tuple[nn.Parameter, int]], pinned: bool) -> Piece:
    """Copy the values of parameters into a piece, where they lie from then on."""
    last, start = places[-1]
    piece = Piece(torch.empty(start + last.nbytes, dtype=torch.uint8, pin_memory=pinned), places)
    for parameter, start in places:
        values_at(piece.memory, start, parameter).copy_(parameter)
    piece.place(piece.memory)
    return piece


def values_at(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """Return the values that begin at a byte of memory, in the shape, dtype and layout of a tensor."""
    layout = torch.empty_like(like, device="meta")  # dense, whatever views and gaps the tensor itself has
    return memory[start : start + layout.nbytes].view(layout.dtype).as_strided(layout.shape, layout.stride())
