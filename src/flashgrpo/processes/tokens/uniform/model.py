"""What the process of uniform tokens asks of a network besides what all token processes ask."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from flashgrpo.processes.tokens.model import TokenModel
from flashgrpo.processes.tokens.uniform.settings import AnyPath


@runtime_checkable
class UniformModel(TokenModel, Protocol):
    """A token network that was trained on uniform noise: of the tokens that it is shown any may be noise."""

    @property
    def path(self) -> AnyPath:
        """How tokens were noised when it was trained."""
        ...

    @property
    def shift(self) -> float:
        """Shift of its grid of times."""
        ...

    @property
    def codes(self) -> Tensor | None:
        """Embeddings (V, D) of the codes, by which a metric path measures distances; None where there are none."""
        ...
