"""Settings of credit, of who draws, and of the optimizer step."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from flashgrpo.settings import FORBID_EXTRA, MANY, SMALLEST, Count, Part, Positive, check_number, default_kind

Std = Literal["group", "group-and-anchor", "batch", "none"]


@dataclass(frozen=True)
class Credit:
    """How the samples of a key (in the flow process: of a prompt group) are compared.

    Args:
        baseline: what a sample's reward is held against: the "mean" of its key, or an "anchor", one sample more for
            each prompt group, which is drawn without exploration (2605.14278). Whether all samples of a group
            are worse than the model as it is only an anchor can tell.
        std: advantages are divided by the std of the "group", of the "group-and-anchor" (there by one less than their
            number, as published), of the whole "batch" (all samples of the update), or by nothing, "none" (Dr. GRPO,
            2503.20783). With "group" an easy prompt whose rewards differ by a hair weighs as much as any other; with
            "none" the scale of the rewards is that of the gradient, up to `clip`.
        combine: several rewards are "normalized" each and then weighted and added, so that their units do not matter,
            or weighted "raw" and normalized once.
        clip: advantages are clipped to +-clip.
        bend: how: "hard" cuts them, "soft" bends all of them, clip tanh(A / clip) (2604.23380).
        rescale: advantages are last divided by nothing, by `clip` (2509.25050), or by the "largest" of the update.
        unsafe_weight: factor of the advantages of a key in which no sample beats the anchor in any reward (2605.14278,
            whose code has 1/2): 1 learns from it like from any other which samples are the least bad, 0 leaves it out.
    """

    baseline: Literal["mean", "anchor"] = "mean"
    std: Std = "group"
    combine: Literal["normalized", "raw"] = "normalized"
    clip: float = 5.0
    bend: Literal["hard", "soft"] = "hard"
    rescale: Literal["none", "clip", "largest"] = "none"
    unsafe_weight: float = 1.0
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        check_choice("baseline", self.baseline, ("mean", "anchor"))
        check_choice("std", self.std, get_args(Std))
        check_choice("combine", self.combine, ("normalized", "raw"))
        check_choice("bend", self.bend, ("hard", "soft"))
        check_choice("rescale", self.rescale, ("none", "clip", "largest"))
        check_number("clip of advantages", self.clip)
        check_number("unsafe_weight", self.unsafe_weight, 0, 1)
        if not self.anchored and (self.std == "group-and-anchor" or self.unsafe_weight != 1):
            raise ValueError(
                "there is no anchor for std=group-and-anchor or unsafe_weight to look at; take credit.baseline=anchor"
            )

    @property
    def anchored(self) -> bool:
        """Whether each prompt group has an anchor."""
        return self.baseline == "anchor"


@dataclass(frozen=True)
class Current:
    """Samples are drawn by the weights that are trained."""

    draws: ClassVar[bool] = False
    kind: Literal["current"] = "current"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA


@dataclass(frozen=True)
class Averaged:
    """Samples are drawn by an average of the weights, `old <- d old + (1 - d) new` after each update (2509.16117).

    After n updates `d = min(slope max(n - start, 0), ceiling)`: the average follows closely at first, and ever more
    slowly.

    Args:
        slope: by which d rises with each update.
        start: updates before it rises.
        ceiling: the largest d.
        draws: whether the average draws; otherwise the weights that are trained do, and it serves `average_coef`.
    """

    slope: float = 0.001
    start: int = 0
    ceiling: float = 0.5
    draws: bool = True
    kind: Literal["averaged"] = "averaged"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        check_number("slope of Averaged", self.slope, 0)
        check_number("start of Averaged", self.start, 0, MANY)
        if not 0 <= self.ceiling < 1:
            raise ValueError(f"ceiling of Averaged must be at least 0 and below 1, not {self.ceiling}")

    def kept(self, updates: int) -> float:
        """Return d, the share of the average that stays, after a number of updates."""
        return min(self.slope * max(updates - self.start, 0), self.ceiling)


@dataclass(frozen=True)
class Frozen:
    """Samples are drawn by the weights of some updates ago.

    Args:
        updates: that one set of weights draws for, before the trained ones take its place.
    """

    updates: int = 2
    draws: ClassVar[bool] = True
    kind: Literal["frozen"] = "frozen"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        if not 2 <= self.updates <= MANY:
            raise ValueError(
                f"updates of Frozen must be from 2 to {MANY:,}, not {self.updates!r:.40}; with 1 it is "
                "behaviour.kind=current"
            )

    def kept(self, updates: int) -> float:
        """Return 0 where the trained weights take the place of those that draw, after a number of updates, else 1."""
        return float(updates % self.updates != 0)


AnyBehaviour = Annotated[Current | Averaged | Frozen, Field(discriminator="kind"), default_kind("current")]


def check_average(average_coef: float, behaviour: AnyBehaviour) -> None:
    """Refuse a penalty to an average that nobody keeps, and an average that nothing uses, with a ValueError."""
    if average_coef and not isinstance(behaviour, Averaged):
        raise ValueError(
            "algorithm.objective.average_coef: there is no average to stay near; take "
            "algorithm.behaviour.kind=averaged, or leave it out"
        )
    if isinstance(behaviour, Averaged) and not behaviour.draws and not average_coef:
        raise ValueError(
            "algorithm.behaviour: an average that does not draw serves objective.average_coef alone, which is 0; set "
            "that, or behaviour.draws=true"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(choices)}, not {value!r}")


class EmaConfig(Part):
    """Exponential moving average of the trained weights; evaluation and export use it."""

    decay: float = Field(default=0.9, ge=0, lt=1)
    """Share of the average that stays when the weights of the moment are averaged in."""
    every: Count = 8
    """Optimizer steps between two averagings."""

    def moved(self, steps: int) -> float:
        """Return which share of the average's weight belongs to trained weights after a number of optimizer steps.

        The rest, `decay` to the power of the averagings, is still the base: a decay of 0.9 every 8 steps gives 0.1
        after 10 steps and 0.72 after 100.
        """
        return 1 - self.decay ** (steps // self.every)


class OptimConfig(Part):
    """AdamW and how an update is cut into optimizer steps and micro-batches."""

    lr: float = Field(default=1e-4, ge=SMALLEST, le=1e3)
    """Learning rate, once `warmup` is over."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    weight_decay: float = Field(default=1e-4, ge=0, le=1e3)
    """Decoupled: the share of a weight that an optimizer step takes away is this times the learning rate."""
    eps: float = Field(default=1e-8, ge=SMALLEST, le=1)
    """Added to the root of the second moment."""
    warmup: int = Field(default=0, ge=0, le=MANY)
    """Optimizer steps over which the learning rate rises linearly."""
    max_grad_norm: Positive = 1.0
    """A larger norm of the gradient is cut to this."""
    max_bad_steps: Count = 5
    """End the run when this number of optimizer steps in a row have a gradient or a loss that is not finite. Each is
    skipped: it counts as a step, also for `warmup` and `ema.every`, and leaves weights and moments as they are."""
    max_bad_groups: float = Field(default=0.25, ge=0, le=1)
    """End the run at an update in which more than this share of the prompt groups have a reward that is not finite.
    Each is dropped: its advantages are 0."""
    micro_batch: Count = 16
    """Transitions in one backward pass; it changes memory and speed, never the gradient."""
    minibatches: Count = 1
    """Optimizer steps per pass over a rollout; each takes an equal share of its prompt groups, whole ones where there
    are as many."""
    passes: Count = 1
    """Passes over a rollout."""
    ema: EmaConfig = EmaConfig()
    """Average of the trained weights, which is what is evaluated and exported."""
    grad_norm_by_step: bool | None = None
    """Record the gradient norm by denoising step; it takes the memory of two more copies of the gradients. When not
    given, where ranks do not hold the network between them, since there it costs network calls."""

    def steps(self, updates: int) -> int:
        """Optimizer steps of a number of updates."""
        return updates * self.minibatches * self.passes

    def clip_factor(self, norm: float) -> float:
        """Return what a gradient of a norm is multiplied by so that it is not above `max_grad_norm`."""
        return min(1.0, self.max_grad_norm / (norm + 1e-6))

    def average_moved(self, updates: int) -> float:
        """Return `EmaConfig.moved` after a number of updates."""
        return self.ema.moved(self.steps(updates))

    def average_lags(self, updates: int) -> str | None:
        """Say so where less than half of the average belongs to trained weights after a number of updates."""
        moved = self.average_moved(updates)
        return (
            f"after {updates} updates the averaged weights, which evaluation and export use, are still the base model "
            f"to {100 * (1 - moved):.0f} %; lower optim.ema.decay or optim.ema.every, or raise updates"
            if moved < 0.5
            else None
        )

    def check(self, samples: int, updates: int, whole_groups: int | None = None) -> None:
        """Refuse more optimizer steps than there are samples, an average that never moves, and more decay than weight.

        Args:
            whole_groups: the number of prompt groups, where their samples have to stay together.

        Raises:
            ValueError: an update has fewer samples than it is cut into parts, or a run fewer steps than `ema.every`; or
                a step takes more than all of a weight away, so that weights grow without end.
        """
        if (taken := self.lr * self.weight_decay) > 1:
            raise ValueError(
                f"optim.weight_decay: times optim.lr it is {taken:g}, the share of each weight that a step takes away; "
                "lower it to at most 1"
            )
        if whole_groups is not None and self.minibatches > whole_groups:
            raise ValueError(
                f"optim.minibatches: {self.minibatches} optimizer steps cannot share {whole_groups} prompt groups "
                "whose samples compete; lower it, or raise rollout.prompts"
            )
        if self.minibatches > samples:
            raise ValueError(f"optim.minibatches: {samples} samples cannot be cut into {self.minibatches} parts")
        steps = self.steps(updates)
        if self.ema.every > steps:
            raise ValueError(
                f"optim.ema.every: the run has {steps} optimizer steps, so an average that moves every "
                f"{self.ema.every} would stay the base model, which is what evaluation would see; lower it"
            )
