"""What objectives have in common: penalties, and clipped ratios. Free of torch, since objectives are settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from flashgrpo.learning.ratio import ClipRange, Columns, Rows, check_clip_range, clip_pair
from flashgrpo.settings import FORBID_EXTRA, check_number


@dataclass(frozen=True, kw_only=True)
class Penalized:
    """What every objective has: penalties that hold the policy near the base model, and near the average.

    Args:
        kl_coef: weight of the KL divergence to the base model; 0 computes none. Of re-noised scores it is the squared
            distance of the velocities, mean((v - v_base)^2); of `Competing` that of the shares, once for each key.
        average_coef: the same to the averaged weights of `behaviour`.
    """

    kl_coef: float = 0.0
    average_coef: float = 0.0
    coupled: ClassVar[bool] = False
    needs_probabilities: ClassVar[bool] = False
    """Whether the exponential of a score has to be a probability."""
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        for name in ("kl_coef", "average_coef"):
            check_number(name, getattr(self, name), 0)

    @property
    def columns(self) -> Sequence[str]:
        """What a replay has to bring besides the score."""
        return (*self._own_columns, *(name for _, name in self._penalties))

    @property
    def constants(self) -> Sequence[str]:
        """Columns that no gradient goes through."""
        return ()

    @property
    def _own_columns(self) -> Sequence[str]:
        return ()

    @property
    def _penalties(self) -> Sequence[tuple[float, str]]:
        """The coefficient and the column of each penalty that there is."""
        both = ((self.kl_coef, "kl"), (self.average_coef, "kl_average"))
        return [(coefficient, name) for coefficient, name in both if coefficient]

    @property
    def needs_reference(self) -> bool:
        """Whether a column is computed by the base model's weights."""
        return self.kl_coef > 0

    @property
    def smallest_clip(self) -> float | None:
        """How far from 1 a ratio is at least where it is clipped; None where no ratio is."""
        return None

    def log_ratio(self, score: Rows, old: Rows, columns: Columns) -> Rows:
        """Return the logarithm of the ratio of each of T terms to the policy that drew, (T,)."""
        return score - old

    def penalized(self, losses: Rows, columns: Columns) -> Rows:
        """Add the penalties to the loss of each of T terms, (T,)."""
        for coefficient, name in self._penalties:
            losses = losses + coefficient * columns[name]
        return losses


@dataclass(frozen=True)
class ClipsRatios(Penalized):
    """What objectives have that clip ratios.

    Args:
        clip_range: c of clip(ratio, 1 - c, 1 + c), or a pair (low, high).
    """

    clip_range: ClipRange = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip_range(self.clip_range)

    @property
    def smallest_clip(self) -> float | None:
        """The smaller of both bounds."""
        return min(clip_pair(self.clip_range))
