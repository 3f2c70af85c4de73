"""Whether the graph of a trained step is kept from rollout to update, so that nothing is computed again.

A replay costs one forward of the network for each trained step. Where the update makes a single optimizer step, the
policy that it differentiates is the one that drew, so the forward of the rollout will do - if what autograd saves of it
fits into memory for all samples at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flashgrpo.distributed import memory

SHARE = 0.25  # of the device's memory, which graphs may fill at most


class Graphs:
    """Keeps graphs, or finds with the first of them that all would not fit, and keeps none from then on.

    The decision is that of the machine and the settings, not of the moment, so that a resumed run decides the same.

    Args:
        calls: of the network with trained steps that this process makes in an update, at least.
        limit: bytes that the graphs of an update may take; None: whatever they take.

    Attributes:
        kept: whether graphs are kept.
        bytes_each: what autograd saves for one call of the network; None before the first.
    """

    def __init__(self, calls: int, limit: int | None) -> None:
        self.kept = True
        self.bytes_each: int | None = None
        self._calls, self._limit, self._made = calls, limit, 0

    def begin(self) -> None:
        """A rollout begins; the graphs of the last are gone."""
        self._made = 0

    @contextmanager
    def of(self, network: nn.Module) -> Iterator[bool]:
        """Around one call of the network, made with a graph as a replay is; says whether that is to be kept."""
        self._made += 1
        if self.bytes_each is not None:
            self._decide()
        if not self.kept or self.bytes_each is not None:
            with torch.enable_grad():
                yield self.kept
            return
        saved, weights = dict[int, int](), {parameter.data_ptr() for parameter in network.parameters()}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if tensor.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # itself would hold the graph that holds it

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield True
        self.bytes_each = sum(saved.values())
        self._decide()

    def _decide(self) -> None:
        assert self.bytes_each is not None
        if self._limit is not None and self.bytes_each * max(self._calls, self._made) > self._limit:
            self.kept = False


def room_for_graphs(device: torch.device) -> int:
    """Bytes: a quarter of the device's memory, but no more than half of what this process leaves free on a GPU."""
    return int(min(SHARE * memory.total(device), memory.free(device) / 2))
