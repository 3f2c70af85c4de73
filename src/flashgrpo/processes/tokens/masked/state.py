"""What an update needs of samples that were unmasked, to score their steps again."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from flashgrpo.processes.choices import Kept
from flashgrpo.processes.tokens.masked.unmasking import Unmasked
from flashgrpo.types import Condition, index_rows, to_device


@dataclass(frozen=True)
class MaskedState:
    """U units, each a step of a sample; of the samples, one row for each of this rank's, whatever its units are.

    Args:
        sample, at: (U,) row and step of each unit.
        places: (U, C) of the tokens that the step drew, rising; C is that of the widest step, and the first place fills
            up.
        count: (U,) of them.
        old_log_p: (U, C, K) by the weights that drew, where a column compares with them.
    """

    sample: Int64[Tensor, " units"]
    at: Int64[Tensor, " units"]
    places: Int64[Tensor, "units widest"]
    count: Int64[Tensor, " units"]
    unmasked: Unmasked
    condition: Condition
    old_log_p: Float32[Tensor, "units widest candidates"] | None = None

    @classmethod
    def of(
        cls,
        sample: Int64[Tensor, " units"],
        at: Int64[Tensor, " units"],
        widest: int,
        unmasked: Unmasked,
        condition: Condition,
    ) -> "MaskedState":
        """Find the tokens of steps."""
        drawn = unmasked.step[sample] == at[:, None]
        places = drawn.int().argsort(dim=1, descending=True, stable=True)[:, :widest]
        count = drawn.sum(1)
        places = torch.where(torch.arange(widest) < count[:, None], places, places[:, :1])
        return cls(sample, at, places, count, unmasked, condition)

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, units: Int64[Tensor, " some"]) -> "MaskedState":
        """Return the state of some units."""
        old = None if self.old_log_p is None else index_rows(self.old_log_p, units)
        one = (self.sample[units], self.at[units], self.places[units], self.count[units])
        return MaskedState(*one, self.unmasked, self.condition, old)

    @property
    def hidden(self) -> Bool[Tensor, "units tokens"]:
        """Which tokens each unit's step saw masked: those that it or a later step draws."""
        return self.unmasked.step[self.sample] >= self.at[:, None]

    @property
    def is_term(self) -> Bool[Tensor, "units widest"]:
        """Which places are terms, and not there to fill up."""
        return torch.arange(self.places.shape[1]) < self.count[:, None]

    @property
    def drawn(self) -> Int64[Tensor, "units widest"]:
        """The token of each place."""
        return self._at_places(self.unmasked.tokens)

    @property
    def kept(self) -> Kept | None:
        """The candidates of each place."""
        return None if self.unmasked.kept is None else self._at_places(self.unmasked.kept)

    def _at_places(self, of_sample: Tensor) -> Tensor:
        return of_sample[to_device(self.sample, of_sample.device)[:, None], to_device(self.places, of_sample.device)]
