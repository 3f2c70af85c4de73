"""Where the parts of a model are: all on the device, or only the one in use and what is trained."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Residence:
    """Brings the part that is about to compute to the device and, with `offload`, sends the others off.

    Only frozen tensors move: what is trained, its gradients and the optimizer's state stay. A frozen tensor never
    changes, so its copy in the CPU's memory is kept and nothing has to be copied back.

    Args:
        parts: name -> module.
    """

    def __init__(self, parts: Mapping[str, nn.Module], device: torch.device, offload: bool) -> None:
        self._parts = dict(parts)
        self._device = device
        self._offload = offload
        self._kept: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}
        self.present: set[str] = set()
        for name, part in self._parts.items():
            if not offload:
                self.bring(name)
                continue
            part.to("cpu")  # the autoencoder may have encoded images
            for parameter in part.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(device)
            frozen = [parameter for parameter in part.parameters() if not parameter.requires_grad]
            for parameter in frozen if device.type == "cuda" else ():
                parameter.data = parameter.data.pin_memory()
            self._kept[name] = [(parameter, parameter.data) for parameter in frozen]

    def bring(self, name: str) -> nn.Module:
        """Return the part, brought to the device."""
        part = self._parts[name]
        if name not in self.present:
            for other in self.present if self._offload else ():
                for parameter, kept in self._kept[other]:
                    parameter.data = kept
            self.present = {name} if self._offload else self.present | {name}
            part.to(self._device)
        return part
