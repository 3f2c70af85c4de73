"""How the flow process explores, and what it scores: the choices of an algorithm."""

from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from flashgrpo.processes.flow.noise import ConstantSde, Cps, FlowSde, LinearSde
from flashgrpo.processes.flow.steps import AllSteps, OneStep, Window
from flashgrpo.processes.flow.weighting import NoiseLevel, NormalizedRatio, PlainRatio, Rectified, StepLength, Uniform
from flashgrpo.processes.settings import ErrorKind
from flashgrpo.seeds import keyed_bits
from flashgrpo.settings import FORBID_EXTRA, check_number

FLOW = "flow"
MOST_STEPS = 10_000

Steps = Annotated[AllSteps | Window | OneStep, Field(discriminator="kind")]
Noise = Annotated[LinearSde | FlowSde | ConstantSde | Cps, Field(discriminator="kind")]
Weighting = Annotated[Uniform | Rectified | NoiseLevel | StepLength, Field(discriminator="kind")]
Ratio = Annotated[PlainRatio | NormalizedRatio, Field(discriminator="kind")]


GuidanceKind = Literal["classifier-free", "embedded", "none"]
"""What a model does with a guidance scale above 1: a second branch, a number that the network is fed, or nothing."""


def branches_of(kind: GuidanceKind) -> int:
    """Return how many branches a call with guidance has."""
    return 2 if kind == "classifier-free" else 1


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
    process: ClassVar[str] = FLOW
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA


@dataclass(frozen=True)
class Deterministic:
    """Explore by the initial noise alone: no step of a rollout is stochastic, so any solver will do."""

    shared_noise: ClassVar[bool] = False
    kind: Literal["deterministic"] = "deterministic"
    process: ClassVar[str] = FLOW
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
    process: ClassVar[str] = FLOW
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
    process: ClassVar[str] = FLOW
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


Explore = Stochastic | Deterministic
ScoreKind = Recorded | Renoised
