"""Settings of credit and of the optimizer step."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from flashgrpo.settings import FORBID_EXTRA, Part


@dataclass(frozen=True)
class Grouping:
    """How the samples of a prompt group are compared.

    Args:
        std: advantages are divided by the std of the "group", or of the whole "batch" (all samples of the update). With
            "group" an easy prompt whose rewards differ by a hair weighs as much as any other.
        shared_noise: all members of a group start from one initial noise and differ by the stochastic steps alone.
        combine: several rewards are "normalized" each and then weighted and added, so that their units do not matter,
            or weighted "raw" and normalized once.
    """

    std: Literal["group", "batch"] = "group"
    shared_noise: bool = False
    combine: Literal["normalized", "raw"] = "normalized"
    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        check_choice("std", self.std, ("group", "batch"))
        check_choice("combine", self.combine, ("normalized", "raw"))


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(choices)}, not {value!r}")


class EmaConfig(Part):
    """Exponential moving average of the trained weights; evaluation and export use it."""

    decay: float = Field(default=0.9, ge=0, lt=1)
    every: int = Field(default=8, ge=1)
    """Optimizer steps between two averagings."""


class OptimConfig(Part):
    """AdamW and how an update is cut into optimizer steps and micro-batches."""

    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(default=1e-4, ge=0)
    eps: float = Field(default=1e-8, gt=0)
    warmup: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises linearly."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    micro_batch: int = Field(default=16, ge=1)
    """Transitions in one backward pass; it changes memory and speed, never the gradient."""
    minibatches: int = Field(default=1, ge=1)
    """Optimizer steps per pass over a rollout; each takes an equal share of its transitions."""
    passes: int = Field(default=1, ge=1)
    """Passes over a rollout."""
    ema: EmaConfig = EmaConfig()
    eight_bit: bool = False
    """Keep AdamW's moments in 8 bits (torchao): a quarter of their memory, for full training in one process."""
    grad_norm_by_step: bool = True
    """Record the gradient norm by denoising step; it takes the memory of two more copies of the gradients."""
