"""Settings of credit, of who draws, and of the optimizer step."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from flashgrpo.settings import FORBID_EXTRA, MANY, Count, Part


@dataclass(frozen=True)
class Credit:
    """How the samples of a key (in the flow process: of a prompt group) are compared.

    Args:
        baseline: what a sample's reward is held against: the mean of its key.
        std: advantages are divided by the std of the "group", or of the whole "batch" (all samples of the update). With
            "group" an easy prompt whose rewards differ by a hair weighs as much as any other.
        combine: several rewards are "normalized" each and then weighted and added, so that their units do not matter,
            or weighted "raw" and normalized once.
        clip: advantages are clipped to +-clip.
        bend: how: "hard" cuts them, "soft" bends all of them, clip tanh(A / clip) (V-GRPO).
        rescale: what is done last: nothing, or the "largest" of the update's advantages becomes 1 (AWM).
    """

    baseline: Literal["mean"] = "mean"
    std: Literal["group", "batch"] = "group"
    combine: Literal["normalized", "raw"] = "normalized"
    clip: float = 5.0
    bend: Literal["hard", "soft"] = "hard"
    rescale: Literal["none", "largest"] = "none"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        check_choice("baseline", self.baseline, ("mean",))
        check_choice("std", self.std, ("group", "batch"))
        check_choice("combine", self.combine, ("normalized", "raw"))
        check_choice("bend", self.bend, ("hard", "soft"))
        check_choice("rescale", self.rescale, ("none", "largest"))
        if not 0 < self.clip < math.inf:
            raise ValueError(f"clip of advantages must be greater than 0 and finite, not {self.clip}")


@dataclass(frozen=True)
class Current:
    """Samples are drawn by the weights that are trained."""

    kind: Literal["current"] = "current"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA


def check_average(average_coef: float, behaviour: Current) -> None:
    """Refuse a penalty to an average that nobody keeps, with a ValueError."""
    if average_coef:
        raise ValueError("algorithm.objective.average_coef: there is no average; leave it out")


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

    lr: float = Field(default=1e-4, gt=0, le=1e3)
    """Learning rate, once `warmup` is over."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    weight_decay: float = Field(default=1e-4, ge=0, le=1e3)
    """Decoupled: the share of a weight that an optimizer step takes away is this times the learning rate."""
    eps: float = Field(default=1e-8, gt=0, le=1)
    """Added to the root of the second moment."""
    warmup: int = Field(default=0, ge=0, le=MANY)
    """Optimizer steps over which the learning rate rises linearly."""
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e9)
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

    def check(self, samples: int, updates: int) -> None:
        """Refuse more optimizer steps than there are samples, and an average that never moves.

        Raises:
            ValueError: an update has fewer samples than it is cut into parts, or a run fewer steps than `ema.every`.
        """
        if self.minibatches > samples:
            raise ValueError(f"optim.minibatches: {samples} samples cannot be cut into {self.minibatches} parts")
        steps = self.steps(updates)
        if self.ema.every > steps:
            raise ValueError(
                f"optim.ema.every: the run has {steps} optimizer steps, so an average that moves every "
                f"{self.ema.every} would stay the base model, which is what evaluation would see; lower it"
            )
