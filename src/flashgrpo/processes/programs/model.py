"""What programs ask of a language model: the logits of a completion, of all of it at once or token by token.

A prompt of n tokens stands on the right of P places, and the L tokens of its completion behind it.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float32, Int64
from torch import Tensor, nn

from flashgrpo.processes.of_model import Model


@runtime_checkable
class LanguageModel(Model, Protocol):
    """A causal language model with its tokenizer."""

    @property
    def length(self) -> int:
        """Tokens of a completion at most, L."""
        ...

    @property
    def width(self) -> int:
        """Tokens of a prompt at most."""
        ...

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a completion, each a part of it."""
        ...

    @property
    def adapters(self) -> Sequence[str]:
        """Names of the sets of adapters, one or more; a model that is trained whole has one name for its weights."""
        ...

    def use(self, adapters: str) -> None:
        """Compute with these adapters from now on, backward passes of what was computed with them included."""
        ...

    def trained_by(self, adapters: str) -> nn.Module:
        """Return what of the network calls with these adapters train: equal names, the same module."""
        ...

    def prompt_ids(self, text: str) -> list[int]:
        """Return the tokens of a call's input, with what the chat template puts around it; at least one."""
        ...

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of a completion, without the token that ends it."""
        ...

    def writes(self, text: str) -> bool:
        """Whether completions can hold this text."""
        ...

    def logits(
        self, ids: Int64[Tensor, "batch places"], count: Int64[Tensor, " batch"]
    ) -> Float32[Tensor, "batch length vocabulary"]:
        """Return the logits that each of the last L tokens is drawn from, differentiably; prompts have `count`."""
        ...

    def begin(
        self, ids: Int64[Tensor, "batch places"], count: Int64[Tensor, " batch"]
    ) -> tuple[Float32[Tensor, "batch vocabulary"], Any]:
        """Return the logits of the first token behind prompts, and the cache by which the next ones are computed."""
        ...

    def go_on(self, token: Int64[Tensor, " batch"], cache: Any) -> Float32[Tensor, "batch vocabulary"]:
        """Return the logits of the token behind this one, which the cache then holds."""
        ...
