"""Settings of the streaming process: how branches come to differ, what is scored of them, and how blocks are drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from flashgrpo.processes.settings import Chosen, ErrorKind, RolloutPart, SamplingPart, needs_old_velocity
from flashgrpo.processes.streaming.window import Window
from flashgrpo.settings import FORBID_EXTRA, MANY, check_number

STREAMING = "streaming"
LONGEST = 100_000  # latent frames


@dataclass(frozen=True)
class Routing:
    """Explore by what blocks see of the past: from a fork on each branch attends to other old frames (2605.14278).

    A branch sees, in `blocks` consecutive blocks, the sink, `routed` frames of the pool and the `nearest` ones. The
    pool of a fork at frame f is `[max(sink, f - reach), f - nearest)`. All noise is shared: branches differ by that
    alone. A fork is the first frame of a block that has as many blocks behind it and a pool that is large enough.

    Args:
        blocks: consecutive blocks that a branch draws in its own context.
        routed: old frames that it attends to there.
        nearest: last frames that every branch keeps; as `window.local` it counts the block's own.
        reach: frames before the fork that the pool goes back; a cache holds no older ones, beside the sink.
        plan: "spread" gives the branches of a group consecutive parts of one permutation of the pool, evenly spaced;
            with "independent" each draws its own. Five of 14 frames for 8 branches have 1.36 frames in common
            on average when spread, and 1.79 when independent.
        earliest: first frame at which a video may fork.
    """

    blocks: int = 5
    routed: int = 5
    nearest: int = 4
    reach: int = 18
    plan: Literal["spread", "independent"] = "spread"
    earliest: int = 0
    kind: Literal["routing"] = "routing"
    process: ClassVar[str] = STREAMING
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        for name in ("blocks", "routed", "nearest", "reach"):
            check_number(f"{name} of Routing", getattr(self, name), 1, LONGEST)
        check_number("earliest of Routing", self.earliest, 0, LONGEST)

    def pool(self, fork: int, window: Window) -> range:
        """Return the old frames that branches may be shown, of a video that forks at a frame."""
        return range(min(max(window.sink, fork - self.reach), fork), max(0, fork - self.nearest))

    def forks(self, frames: int, window: Window) -> list[int]:
        """Return the frames at which a video of so many latent frames may fork.

        Raises:
            ValueError: nowhere.
        """
        last = frames - self.blocks * window.block
        found = [f for f in window.starts(last + 1) if f >= self.earliest and self._enough(f, window)]
        if not found:
            raise ValueError(
                f"algorithm.explore: a video of {frames} latent frames forks nowhere with blocks {self.blocks}, routed "
                f"{self.routed}, nearest {self.nearest} and earliest {self.earliest}; lower them, or make it longer"
            )
        return found

    def places(self, frames: int, window: Window, levels: int) -> list[tuple[int, int]]:
        """Return where branches may part: a frame, and a level of its block."""
        return [(frame, 0) for frame in self.forks(frames, window)]

    def shared_levels(self, level: int) -> int:
        """Return how many levels of the fork's block are drawn once for all branches."""
        return 0

    @property
    def remembered(self) -> int:
        """Last frames of the video before the fork that branches may attend to."""
        return self.reach

    def _enough(self, fork: int, window: Window) -> bool:
        return len(self.pool(fork, window)) > self.routed  # with as many, all branches are alike


@dataclass(frozen=True)
class OneLevel:
    """Explore by the noise between two levels of one block, as Flash-GRPO explores one step of a walk (2605.15980).

    The members of a group share all of their noise but that: a prefix, a block, and of the levels at which the block is
    drawn one whose prediction is noised again by noise of the member's own. Which block and level is drawn for each
    group; all of its members have the same.

    Args:
        earliest: first frame of the first block that may be chosen.
    """

    earliest: int = 0
    remembered: ClassVar[int] = 0
    blocks: ClassVar[int] = 1
    kind: Literal["one-level"] = "one-level"
    process: ClassVar[str] = STREAMING
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        check_number("earliest of OneLevel", self.earliest, 0, LONGEST)

    def places(self, frames: int, window: Window, levels: int) -> list[tuple[int, int]]:
        """Return where members may part: a frame, and a level of its block whose prediction is noised again.

        Raises:
            ValueError: nowhere.
        """
        whole = (frame for frame in window.starts(frames) if window.size(frame) == window.block)
        blocks = [frame for frame in whole if frame >= self.earliest]
        if not blocks:
            raise ValueError(
                f"algorithm.explore.earliest: no block of a video of {frames} latent frames begins at {self.earliest} "
                "or later; lower it"
            )
        return [(frame, level) for frame in blocks for level in range(levels - 1)]

    def shared_levels(self, level: int) -> int:
        """Return how many levels of the chosen block are drawn once for all members."""
        return level + 1


@dataclass(frozen=True)
class Energy:
    """Score a branch by how near the network's predictions in the clean, un-routed context are to it (2605.14278).

        s = - sum over blocks and levels of mean (x0_hat_branch - x0_hat)^2 / (2 max(sigma, floor)^2)

    of the blocks that were drawn in another context. The context of a block is made of the network's own predictions.
    x0_hat is `x - sigma v`, also where v is a mean velocity to the next level.

    Args:
        space: "velocity" (floor 0, as the paper writes it) or "x0" (floor 1, as its code has it).
        trained_levels: levels of a block, from the first on, that a gradient goes through.
    """

    space: Literal["velocity", "x0"] = "velocity"
    trained_levels: int = 2
    kind: Literal["energy"] = "energy"
    process: ClassVar[str] = STREAMING
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        check_number("trained_levels of Energy", self.trained_levels, 1, MANY)


@dataclass(frozen=True)
class Transition:
    """Score the noise between two levels by the log-density that the network gives it.

        log N(x'; (1 - sigma') x0_hat, sigma'^2),  mean over dims, without its constant

    Args:
        rectified: divide by the size that its gradient has by the velocity, sigma (1 - sigma') / sigma', relative to
            the mean over levels (temporal gradient rectification, 2605.15980).
    """

    rectified: bool = True
    kind: Literal["transition"] = "transition"
    process: ClassVar[str] = STREAMING
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA


@dataclass(frozen=True)
class NoisedBlock:
    """Score the finished block, noised again to one of the model's levels, by how well the network tells the noise.

    The level is drawn for each group, the noise is a member's own; see `processes/renoise.py`. With the objective
    `contrast` it is DiffusionNFT (2509.16117) for a model that draws at few levels.

    Args:
        weight: the error that is minimised.
    """

    weight: ErrorKind = "self-normalized"
    kind: Literal["renoised-block"] = "renoised-block"
    process: ClassVar[str] = STREAMING
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA


class StreamRollout(RolloutPart):
    """How the branches of an update are drawn from a streaming model, block by block."""

    kind: Literal["streaming"] = "streaming"
    """Which of the choices this is; the algorithm's `explore` decides it."""
    sink: int = Field(default=3, ge=0, le=LONGEST)
    """First latent frames of a video, which every block attends to."""
    local: int = Field(default=9, ge=1, le=LONGEST)
    """Last latent frames that a block attends to, up to and including its own."""
    block: int = Field(default=3, ge=1, le=LONGEST)
    """Latent frames that are drawn together, as the model was trained to."""
    first_block: int = Field(default=0, ge=0, le=LONGEST)
    """As many at a video's beginning, where the model was trained to begin with fewer; 0: as many as later."""
    clip: int = Field(default=36, ge=1, le=LONGEST)
    """Video frames of a clip, for rewards that look at clips."""

    @property
    def window(self) -> Window:
        """Which past frames a block attends to."""
        return Window(self.sink, self.local, self.block, self.first_block)

    @model_validator(mode="after")
    def _holds_a_block(self) -> "StreamRollout":
        self.window  # noqa: B018 - refuses by itself
        return self

    def check(self, chosen: Chosen) -> None:
        """Refuse choices that cannot work with each other or with these settings, with a ValueError."""
        check_pair(chosen.explore, chosen.score, chosen.coupled, chosen.anchored, chosen.columns)
        if isinstance(chosen.explore, Routing) and not self.block <= chosen.explore.nearest <= self.local:
            raise ValueError(
                f"algorithm.explore.nearest: it counts the block's own {self.block} frames and is a part of "
                f"rollout.local, so it is from {self.block} to {self.local}, not {chosen.explore.nearest}"
            )
        if chosen.compiled:
            raise ValueError("model.compile: a streaming model has no use for it; leave it out")

    def facts(self) -> Mapping[str, str]:
        """Return what a model card says of the rollout beside its size."""
        return {"Window": f"{self.sink} first and {self.local} last latent frames"}


def check_pair(explore: Any, score: Any, coupled: bool, anchored: bool, columns: Sequence[str]) -> None:
    """Refuse an explorer with a score that cannot learn from it, with a ValueError.

    Args:
        coupled: whether scores compete inside their key.
        anchored: whether each group has a sample that is drawn without exploration.
        columns: that the objective asks a replay for.
    """
    if isinstance(score, Energy) and not isinstance(explore, Routing):
        raise ValueError(
            "algorithm.score: energy compares contexts, and branches that differ by noise have the same one: every "
            "score is 0, and nothing is learnt; take algorithm.explore.kind=routing, or score.kind=transition"
        )
    if not isinstance(score, Energy) and not isinstance(explore, OneLevel):
        raise ValueError(
            f"algorithm.score: {score.kind} scores one block of each branch; it needs algorithm.explore.kind=one-level"
        )
    if isinstance(score, Energy) and not coupled:
        raise ValueError(
            "algorithm.objective: an energy is no log-probability; take algorithm.objective.kind=competing, in which "
            "branches share a probability of 1"
        )
    if not isinstance(score, Energy) and (coupled or anchored):
        raise ValueError(
            f"algorithm.score: {score.kind} judges each branch by itself, without an anchor; take "
            "algorithm.objective.kind=clipped or contrast and algorithm.credit.baseline=mean"
        )
    if isinstance(score, Transition) and needs_old_velocity(columns):
        raise ValueError(
            "algorithm.objective: it compares velocities with those of the weights that drew, which a transition does "
            "not record; take algorithm.score.kind=renoised-block, or algorithm.objective.kind=clipped"
        )


StreamExplore = Routing | OneLevel
StreamScore = Energy | Transition | NoisedBlock


class StreamSampling(SamplingPart):
    """How a streaming model draws an evaluation: un-routed, at its own levels."""

    kind: Literal["streaming"] = "streaming"
    """Which of the choices this is; the algorithm's `explore` decides it."""
