"""Settings of the flow process: how it explores, what it scores, and how its samples are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from flashgrpo.processes.flow.noise import ConstantSde, Cps, FlowSde, LinearSde
from flashgrpo.processes.flow.reuse import FirstBlock, TaylorSeer
from flashgrpo.processes.flow.solvers import DpmSolver, Euler, UniPC
from flashgrpo.processes.flow.steps import AllSteps, OneStep, Window
from flashgrpo.processes.flow.weighting import NoiseLevel, NormalizedRatio, PlainRatio, Rectified, StepLength, Uniform
from flashgrpo.seeds import keyed_bits
from flashgrpo.settings import FORBID_EXTRA, MANY, Count, Part, check_number, default_kind

MOST_STEPS = 10_000

Steps = Annotated[AllSteps | Window | OneStep, Field(discriminator="kind")]
Noise = Annotated[LinearSde | FlowSde | ConstantSde | Cps, Field(discriminator="kind")]
Weighting = Annotated[Uniform | Rectified | NoiseLevel | StepLength, Field(discriminator="kind")]
Ratio = Annotated[PlainRatio | NormalizedRatio, Field(discriminator="kind")]
Solver = Annotated[Euler | UniPC | DpmSolver, Field(discriminator="kind")]
ErrorKind = Literal["uniform", "t", "t2", "huber", "ghuber", "self-normalized"]


@dataclass(frozen=True)
class Stochastic:
    """Explore by noise: which denoising steps of a rollout are stochastic, and trained, and what they draw.

    Args:
        steps: which.
        noise: the transition density of those steps.
        shared_noise: all members of a group start from one initial noise and differ by the stochastic steps alone.
    """

    steps: Steps
    noise: Noise
    shared_noise: bool = False
    kind: Literal["stochastic"] = "stochastic"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA


@dataclass(frozen=True)
class Deterministic:
    """Explore by the initial noise alone: no step of a rollout is stochastic, so any solver will do."""

    shared_noise: ClassVar[bool] = False
    kind: Literal["deterministic"] = "deterministic"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA


@dataclass(frozen=True)
class Recorded:
    """Score the stochastic steps as they were drawn, by the log-density of each.

    Args:
        weighting: the factor of each step's surrogate; `Rectified` divides lambda out (2605.15980), `NoiseLevel` is
            TempFlow-GRPO's (2508.04324) and `StepLength` GRPO-Guard's (2510.22319).
        ratio: the importance ratio as it is, or GRPO-Guard's `NormalizedRatio`, which goes with any of the choices.
    """

    weighting: Weighting = field(default_factory=Uniform)
    ratio: Ratio = field(default_factory=PlainRatio)
    kind: Literal["recorded"] = "recorded"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA


@dataclass(frozen=True)
class Renoised:
    """Score finished samples, noised again to some levels, by how well the network tells the noise; see `renoise.py`.

    Args:
        times: noise levels of each sample. When not given, with draw "shuffled", 99 % of the window's points, rounded
            down (DiffusionNFT).
        draw: "stratified" cuts the window into equal parts and draws a level within each; "grid" cuts the points of the
            rollout's grid and draws one of each part (AWM); "shuffled" deals points of the grid without replacement.
        window: part of the grid, in fractions of its steps as in `explore.steps`; (0, 1) is all of it, from pure noise.
        shared: the members of a group share levels and noise (V-GRPO).
        weight: the error that is minimised, and how levels weigh in it.
        guidance_scale: classifier-free guidance in the update; 1 turns it off, whatever the rollout has. It is one for
            both of two experts.
    """

    times: int | None = 6
    draw: Literal["stratified", "grid", "shuffled"] = "stratified"
    window: tuple[float, float] = (0.0, 1.0)
    shared: bool = False
    weight: ErrorKind = "self-normalized"
    guidance_scale: float = 1.0
    kind: Literal["renoised"] = "renoised"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        if self.times is None and self.draw != "shuffled":
            raise ValueError(f"times of Renoised: with draw {self.draw!r} give how many levels a sample has")
        if self.times is not None:
            check_number("times of Renoised", self.times, 1, MOST_STEPS)
        if not 0 <= self.window[0] < self.window[1] <= 1:
            raise ValueError(f"window of Renoised is a pair of fractions, 0 <= low < high <= 1, got {self.window}")
        check_number("guidance_scale of Renoised", self.guidance_scale, 1, 1_000)

    def count(self, num_steps: int) -> int:
        """Return how many noise levels each sample has.

        Raises:
            ValueError: the window has fewer points than are to be drawn.
        """
        if self.draw == "stratified":
            return self.times or 1
        points = len(self._points(num_steps))
        count = points * 99 // 100 if self.times is None else self.times
        if not 1 <= count <= points:
            raise ValueError(
                f"the window {self.window} holds {points} of {num_steps} steps, but {max(count, 1)} are to be drawn: "
                "widen it, take more steps or lower times"
            )
        return count

    def positions(self, num_steps: int, *name: int) -> list[float]:
        """Return where on the grid the levels of a sample lie, rising: k is point k, k + 1/2 half way to the next.

        Args:
            name: of the draw.
        """
        count = self.count(num_steps)
        parts = [keyed_bits("level", *name, number) for number in range(count)]
        if self.draw == "stratified":
            low, high = (edge * num_steps for edge in self.window)
            return [low + (high - low) * (j + (bits >> 11) / 2**53) / count for j, bits in enumerate(parts)]
        points = self._points(num_steps)
        if self.draw == "shuffled":
            dealt = sorted(points, key=lambda point: keyed_bits("shuffled", *name, point))[:count]
            return [float(point) for point in sorted(dealt)]
        edges = [part * len(points) // count for part in range(count + 1)]
        dealt = [points[low + bits % (high - low)] for bits, (low, high) in zip(parts, pairwise(edges), strict=True)]
        return [float(point) for point in dealt]

    def _points(self, num_steps: int) -> list[int]:
        low, high = (ceil(round(edge * num_steps, 6)) for edge in self.window)
        return list(range(low, high))


Explore = Annotated[Stochastic | Deterministic, Field(discriminator="kind"), default_kind("stochastic")]
ScoreKind = Annotated[Recorded | Renoised, Field(discriminator="kind"), default_kind("recorded")]


class RolloutConfig(Part):
    """How the samples of an update are drawn."""

    prompts: Count = 8
    """Prompt groups per update, P."""
    group_size: int = Field(default=8, ge=2, le=MANY)
    """Samples per prompt, G; the baseline of a sample is the mean of its group, so one is not enough."""
    num_steps: int = Field(default=20, ge=2, le=MOST_STEPS)
    """Denoising steps, N."""
    guidance_scale: float = Field(default=4.5, ge=1, le=1_000)
    """Classifier-free guidance in the rollout, and in the update of recorded steps (re-noised samples have
    `score.guidance_scale`); evaluation takes it where it has none of its own. 1 turns it off."""
    guidance_scale_2: float | None = Field(default=None, ge=1, le=1_000)
    """Where the second of two experts computes (Wan 2.2 A14B); as the first when not given."""
    solver: Solver = Euler()
    """Of the deterministic steps."""
    deterministic_steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """Points of the grid at which a deterministic walk stops at most, evenly spread, with both ends of each stochastic
    step besides; all N when not given."""
    guidance_interval: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Sigmas between which deterministic steps use guidance, none with [0, 0]; stochastic steps always do."""
    deterministic_dtype: Literal["bfloat16", "float8"] | None = None
    """In which the network computes deterministic steps (autocast); `float8` is of the frozen linear layers of the
    blocks, beside bfloat16, for GPUs that have units for it."""
    reuse: Annotated[FirstBlock | TaylorSeer, Field(discriminator="kind")] | None = None
    """Of features from one deterministic step to the next, by diffusers' hooks; not for a network that is sharded."""
    retain: bool | None = None
    """Keep the graph of a trained step from rollout to update rather than replay it; when not given, where a rollout
    serves one optimizer step and all graphs take at most a quarter of the device's memory and half of what is free."""
    micro_batch: Count = 64
    """Samples denoised at once."""
    decode_micro_batch: Count = 64
    """Latents decoded at once."""

    @model_validator(mode="after")
    def _possible(self) -> "RolloutConfig":
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval is a pair of sigmas, low <= high, not {list(self.guidance_interval)}")
        return self

    def check_shortcuts(self, held_between: bool, frozen: bool, offload: bool, compiled: bool) -> None:
        """Refuse shortcuts that the network does not allow.

        Args:
            held_between: processes hold a network between them.
            frozen: most weights are not trained.
            offload: whether parts of the model leave the device.
            compiled: whether the blocks are compiled.

        Raises:
            ValueError: float8 or reuse cannot go with that.
        """
        if self.deterministic_dtype == "float8" and (held_between or offload):
            raise ValueError(
                "rollout.deterministic_dtype: float8 needs the network whole and on the device; take bfloat16, or "
                "leave out parallel.shard, parallel.context, model.compute_dtype and model.offload"
            )
        if self.deterministic_dtype == "float8" and not frozen:
            raise ValueError("rollout.deterministic_dtype: float8 is of frozen weights, full training has none")
        if self.reuse and held_between:
            raise ValueError(
                "rollout.reuse: processes that hold a network between them compute every step; leave it out"
            )
        if self.reuse and compiled:
            raise ValueError("rollout.reuse: compiled blocks compute every step; choose one of the two")

    def check_retain(self, held_between: bool, offload: bool, uses: int) -> None:
        """Refuse to keep graphs where an update has to replay the trained steps, with a ValueError."""
        reasons = {
            "a rollout that serves several optimizer steps, or that other weights drew, is replayed": uses > 1,
            "processes that hold a network between them replay together": held_between,
            "with model.offload the network leaves the device before the update": offload,
        }
        for reason, holds in reasons.items():
            if self.retain and holds:
                raise ValueError(f"rollout.retain: {reason}; leave it out")


def needs_old_velocity(columns: Sequence[str]) -> bool:
    """Return whether a column compares with the velocity by the weights that drew."""
    return any(column == "kl_old" or column.startswith("toward:") for column in columns)


def check_shared(coupled: bool, anchored: bool) -> None:
    """Refuse what other processes have and this one has not, with a ValueError.

    Args:
        coupled: whether scores compete inside their group. They could: but each score of this process is a
            log-probability, or stands for one, of its own, and with advantages that sum to 0 the gradient of a softmax
            over a group is that of `Clipped` at ratio 1, for one forward more.
        anchored: whether each group has a sample that is drawn without exploration.
    """
    if anchored:
        raise ValueError(
            "algorithm.credit.baseline: a flow model draws no anchor, a sample without exploration to hold its group "
            "against; take algorithm.credit.baseline=mean"
        )
    if coupled:
        raise ValueError(
            "algorithm.objective: competing is for branches whose scores are no log-probabilities; those of a flow "
            "model are, so take algorithm.objective.kind=clipped"
        )


def check_score(explore: Explore, score: ScoreKind, columns: Sequence[str], rollout: RolloutConfig) -> None:
    """Refuse choices of which the one cannot work with the other, with a ValueError.

    Args:
        columns: that the objective asks a replay for.
    """
    steps = rollout.num_steps
    if isinstance(score, Recorded):
        if isinstance(explore, Deterministic):
            raise ValueError(
                "algorithm.explore: a deterministic rollout has no steps to record; take "
                "algorithm.score.kind=renoised, or explore.kind=stochastic"
            )
        if any(column.startswith("toward:") for column in columns):
            raise ValueError(
                "algorithm.objective: contrast compares velocities at re-noised samples; it needs "
                "algorithm.score.kind=renoised"
            )
        try:
            explore.steps.candidates(steps)
        except ValueError as error:
            raise ValueError(f"algorithm.steps with rollout.num_steps {steps}: {error}") from error
        return
    if isinstance(explore, Stochastic):
        raise ValueError(
            "algorithm.score: re-noised samples leave a rollout's stochastic steps untrained; take "
            "algorithm.explore.kind=deterministic, or score.kind=recorded"
        )
    if rollout.retain:
        raise ValueError("rollout.retain: re-noised samples are scored when the rollout has ended; leave it out")
    try:
        score.count(steps)
    except ValueError as error:
        raise ValueError(f"algorithm.score.times with rollout.num_steps {steps}: {error}") from error


class SamplingConfig(Part):
    """How a video is drawn without noise at its steps: evaluation, and `flashgrpo sample`."""

    num_steps: int = Field(default=50, ge=2, le=MOST_STEPS)
    """Denoising steps."""
    guidance_scale: float | None = Field(default=None, ge=1, le=1_000)
    """The rollout's when not given."""
    guidance_scale_2: float | None = Field(default=None, ge=1, le=1_000)
    """The rollout's when neither is given."""
    solver: Solver = Euler()
    """How a step without noise is computed."""
