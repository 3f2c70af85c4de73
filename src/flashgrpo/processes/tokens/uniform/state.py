"""What a replay of uniform tokens needs."""

from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor

from flashgrpo.types import Condition, index_rows


@dataclass(frozen=True)
class TokensState:
    """Tokens that the network is shown, and those that are scored, of U units.

    Args:
        sample: the number of each unit's sample among this rank's; `condition` has a row for each of those.
        k: the step of the grid.
        x, action: (U, L).
    """

    sample: Int64[Tensor, " units"]
    k: Int64[Tensor, " units"]
    x: Int64[Tensor, "units tokens"]
    action: Int64[Tensor, "units tokens"]
    condition: Condition

    def __len__(self) -> int:
        return len(self.k)

    def __getitem__(self, units: Int64[Tensor, " some"]) -> "TokensState":
        """Return the state of some units."""
        x, action = index_rows(self.x, units), index_rows(self.action, units)
        return TokensState(self.sample[units], self.k[units], x, action, self.condition)

    @property
    def conditions(self) -> Condition:
        """The condition of each unit."""
        return self.condition[self.sample]
