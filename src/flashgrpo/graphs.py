"""Whether the graph of a trained step is kept from rollout to update, so that nothing is computed again.

A replay costs one forward of the network for each trained step. Where the update makes a single optimizer step, the
policy that it differentiates is the one that drew, so the forward of the rollout will do - if what autograd saves of it
fits into memory for all samples at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flashgrpo import memory
from flashgrpo.errors import UserError

SHARE = 0.25  # of the device's memory, which graphs may fill at most


class Graphs:
    """Keeps graphs, or finds with the first of them that all would not fit, and keeps none from then on.

    Args:
        transitions: that this process records in an update, at most.
        limit: bytes that the graphs of an update may take; None: whatever they take.

    Attributes:
        kept: whether graphs are kept.
        bytes_each: what autograd saves for one transition; None before the first.
    """

    def __init__(self, transitions: int, limit: int | None) -> None:
        self.kept = True
        self.bytes_each: int | None = None
        self._transitions, self._limit = transitions, limit

    @contextmanager
    def of(self, network: nn.Module, rows: int) -> Iterator[None]:
        """Inside of it the forward of so many rows leaves a graph, while graphs are kept."""
        if not self.kept:
            yield
            return
        if self.bytes_each is not None or self._limit is None:
            with torch.enable_grad():
                yield
            return
        saved, weights = dict[int, int](), {parameter.data_ptr() for parameter in network.parameters()}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if tensor.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        self.bytes_each = -(-sum(saved.values()) // rows)
        self.kept = self.bytes_each * self._transitions <= self._limit


def graphs_for(setting: bool | None, transitions: int, replays: str | None, device: torch.device) -> Graphs | None:
    """As `rollout.retain` says; None where every step is to be replayed.

    Args:
        setting: keep them, do not, or (None) keep them if they take at most a quarter of the device's memory, and half
            of what is free on a GPU when the model is there.
        replays: why a replay is necessary all the same, if it is.

    Raises:
        UserError: they are to be kept, and cannot be.
    """
    if setting and replays:
        raise UserError(f"rollout.retain: {replays}; leave it out")
    if setting is False or replays:
        return None
    room = int(min(SHARE * memory.total(device), memory.free(device) / 2))
    return Graphs(transitions, None if setting else room)
