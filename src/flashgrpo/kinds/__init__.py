"""What a run needs of each kind of process before it is one: how it is loaded, and what its updates will cost.

`config.rollout.kind` says which; a kind is a module with the functions of `Kind`.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import World
from flashgrpo.kinds import flow, masked_tokens, programs, streaming, uniform_tokens
from flashgrpo.models.load import Say
from flashgrpo.process import Cost, Process
from flashgrpo.types import Prompt


@runtime_checkable
class Memory(Protocol):
    """What a model of a kind takes of memory, counted on its full size without weights: bytes, on one process."""

    network: nn.Module
    """All of it, with what is trained."""
    networks: Sequence[nn.Module]
    """Its parts that take turns on the device where they are offloaded."""
    decoder: nn.Module
    """What makes media of what was drawn; empty where nothing does."""

    @property
    def further_weights(self) -> int:
        """Of weights that are there in another form besides."""
        ...

    @property
    def sample(self) -> float:
        """Of a sample that has been drawn, with its condition."""
        ...

    def kept(self, samples: int) -> Mapping[str, int]:
        """Part -> bytes of what is kept of samples from the rollout to the end of the update."""
        ...

    def drawing(self, samples: int) -> int:
        """At the highest of drawing a micro-batch of these samples for an update."""
        ...

    def update(self, samples: int) -> int:
        """At the highest of replaying a micro-batch of these samples with its backward pass."""
        ...

    def sampling(self, samples: int) -> int:
        """At the highest of drawing a micro-batch of these samples for an evaluation."""
        ...

    def decoding(self, samples: int) -> int:
        """At the highest of decoding a micro-batch of these samples."""
        ...


@runtime_checkable
class Kind(Protocol):
    """A kind of process."""

    def make_process(
        self, config: RunConfig, world: World, prompts: Sequence[Prompt], say: Say | None = None
    ) -> Process:
        """Load the model of a run, with the process that draws from it.

        Args:
            prompts: that will be asked for; they are encoded before the network is loaded.

        Raises:
            UserError: the model cannot be had, or cannot do what the settings say.
        """
        ...

    def planned_cost(self, config: RunConfig, update: int) -> Cost:
        """Return what an update will cost, before weights are loaded."""
        ...

    def memory(self, config: RunConfig) -> Memory:
        """Count what the model of a run takes of memory; nothing is downloaded.

        Raises:
            UserError: its sizes are neither known nor in a folder, or do not fit the sample's.
        """
        ...


KINDS: Mapping[str, Kind] = {
    "flow": flow,
    "streaming": streaming,
    "masked-tokens": masked_tokens,
    "uniform-tokens": uniform_tokens,
    "programs": programs,
}


def kind_of(config: RunConfig) -> Kind:
    """Return the kind of process that a run draws from."""
    return KINDS[config.rollout.kind]
