"""Settings that every process has, and what a process is told of a run before it says whether it can do it."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from flashgrpo.settings import MANY, Count, Part

ErrorKind = Literal["uniform", "t", "t2", "huber", "ghuber", "self-normalized"]
"""How the error of a velocity is measured; see `renoise.py`."""


@dataclass(frozen=True)
class Chosen:
    """What a run has chosen beside its rollout, as far as a process may be unable to do it.

    Args:
        explore: how the samples of a group come to differ.
        score: what is replayed and judged.
        columns: that the objective asks a replay for.
        coupled: whether scores compete inside their key.
        anchored: whether each group has a sample that is drawn without exploration.
        uses: how often a rollout is told that its units are replayed.
        held_between: whether processes hold a network between them.
        frozen: whether most weights are not trained.
        offload: whether parts of the model leave the device.
        compiled: whether the network's blocks are compiled.
    """

    explore: Any
    score: Any
    columns: Sequence[str]
    coupled: bool
    anchored: bool
    uses: int
    held_between: bool
    frozen: bool
    offload: bool
    compiled: bool


class RolloutPart(Part):
    """How the samples of an update are drawn. A process adds a `kind`, its own name, and what else it draws by."""

    scores_are_probabilities: ClassVar[bool] = False
    """Whether a term's score is the log-probability of one token."""
    prompts: Count = 8
    """Prompt groups per update, P."""
    group_size: int = Field(default=8, ge=2, le=MANY)
    """Samples per prompt, G; the baseline of a sample is the mean of its group, so one is not enough."""
    micro_batch: Count = 64
    """Samples drawn at once."""
    decode_micro_batch: Count = 64
    """Samples decoded at once."""

    @abstractmethod
    def check(self, chosen: Chosen) -> None:
        """Refuse choices that cannot work with each other or with these settings, with a ValueError."""

    def absolute(self, call: Callable[[str], str]) -> "RolloutPart":
        """Return the same settings, with every path in them made absolute by `call`."""
        return self

    def facts(self) -> Mapping[str, str]:
        """Return what a model card says of the rollout beside its size."""
        return {}


class SamplingPart(Part):
    """How samples are drawn in evaluations. A process adds a `kind`, its own name, and what else it draws by."""

    def written_out(self, rollout: Any) -> Mapping[str, Any]:
        """Return settings that are taken from the rollout where they are not given, as they are then."""
        return {}

    def pipeline_arguments(self, rollout: Any) -> Mapping[str, Any]:
        """Return what the model's own pipeline has to be told, to draw as an evaluation does."""
        return {}


def needs_old_velocity(columns: Sequence[str]) -> bool:
    """Return whether a column compares with the velocity by the weights that drew."""
    return any(column == "kl_old" or column.startswith("toward:") for column in columns)
