"""What the processes that draw tokens ask of a network: logits of every token of a sample, given the others.

A sample is L tokens, of V that the network chooses from. V may be 64,000, and then the logits of a sample of 1,024
tokens take 262 MB. So a network hands out hidden states with a head, and what is made of both, a `Read`, decides of
which tokens it wants logits, and how many at a time.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Int64
from torch import Tensor

from flashgrpo.processes.of_model import Model
from flashgrpo.types import Condition, Media

Tokens = Int64[Tensor, "batch tokens"]
Head = Callable[[Tensor], Tensor]
"""Maps hidden states (..., D) of any tokens to their logits (..., V), in float32."""
Read = Callable[[Tensor, Head], Tensor]
"""Makes a tensor of the hidden states (B, L, D) of a call and the head; differentiable where the network is."""


@runtime_checkable
class TokenModel(Model, Protocol):
    """A network that predicts tokens from tokens, and what decodes them."""

    @property
    def length(self) -> int:
        """Tokens of a sample, L."""
        ...

    @property
    def vocabulary(self) -> int:
        """Tokens that the network chooses from, V: 0 to V - 1."""
        ...

    @property
    def mask(self) -> int | None:
        """The token that stands for one that is not drawn yet; None of a network that has none."""
        ...

    @property
    def end(self) -> int | None:
        """The token that texts end with, and are filled up with; None where samples do not end."""
        ...

    def call(self, tokens: Tokens, condition: Condition, read: Read) -> Tensor:
        """Call the network on B rows of tokens, masks among them, and return what `read` makes of the result.

        `read` runs inside of the network's forward, where FSDP2 has gathered the head's weights. It may ask the head
        for logits under `torch.utils.checkpoint`, and may give fewer rows than it gets.
        """
        ...

    def decode(self, tokens: Tokens, frames: int | None = None) -> Media:
        """Return videos (B, F, 3, H, W) in [0, 1], images of one frame, or B texts; with `frames` only the first."""
        ...
