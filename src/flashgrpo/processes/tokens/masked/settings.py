"""Settings of masked tokens: how a rollout unmasks, and which of its steps are scored again. Free of torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from flashgrpo.processes.settings import Chosen, RolloutPart, SamplingPart
from flashgrpo.processes.subsets import Draw
from flashgrpo.settings import FORBID_EXTRA, Count, check_number

Order = Literal["random", "low-confidence", "entropy"]
Schedule = Literal["linear", "cosine"]
MASKED = "masked-tokens"
MOST_STEPS = 10_000


@dataclass(frozen=True)
class Unmasking:
    """Explore by drawing tokens in place of masks, a few at each step (AGRPO, arXiv 2510.04019).

    A step draws a token for every mask of its block, by the logits divided by `temperature`, of which `top_k` and then
    `top_p` leave the largest; and keeps those that `order` puts first.

    Args:
        order: "random" keeps tokens at places that do not depend on the policy, so that what is scored is all of the
            action. "low-confidence" keeps the tokens that the policy is surest of and masks the others again, "entropy"
            those at the places it is surest at: better samples for an estimate with a bias, since which place is kept
            then depends on the policy and is not scored.
        temperature: logits are divided by it, in scoring as in drawing.
        top_k: candidates of a token, at most; each one's ids are kept for scoring.
        top_p: of these, the likeliest that have this probability together.
    """

    order: Order = "random"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    kind: Literal["unmasking"] = "unmasking"
    process: ClassVar[str] = MASKED
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        if self.temperature == 0:
            raise ValueError(
                "temperature of Unmasking: 0 draws the likeliest token, so that the samples of a group hardly differ; "
                "take a value above 0"
            )
        check_number("temperature of Unmasking", self.temperature, 0.001, 1_000)
        check_truncation("Unmasking", self.top_k, self.top_p)


@dataclass(frozen=True)
class UnmaskedSteps:
    """Score the tokens of some steps again, each step in the very state that it saw: a forward a step, a term a token.

    Steps are drawn anew for every sample and weighted so that their mean is that of all steps (`subsets.py`).

    Args:
        steps: drawn for each sample; with draw "all" it has no say.
        draw: "stratified" spreads the steps over the sample, "independent" draws each by itself, "all" takes every
            step once. The published code spreads them over the samples of a batch; here each sample's depend on its own
            name.
        chance: every step is as likely ("uniform"), or more so where its tokens were less certain ("entropy").
        state: "exact" masks what a step saw masked; "mean-field" masks every token, whichever step is scored: an
            ablation, with the cheap states of diffu-GRPO.
    """

    steps: int = 24
    draw: Draw = "stratified"
    chance: Literal["uniform", "entropy"] = "uniform"
    state: Literal["exact", "mean-field"] = "exact"
    kind: Literal["unmasked-steps"] = "unmasked-steps"
    process: ClassVar[str] = MASKED
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        check_number("steps of UnmaskedSteps", self.steps, 1, MOST_STEPS)

    def count(self, num_steps: int) -> int:
        """Return how many units a sample of so many steps has."""
        return num_steps if self.draw == "all" else self.steps


class MaskedRollout(RolloutPart):
    """How the samples of an update are drawn from masked tokens."""

    scores_are_probabilities: ClassVar[bool] = True
    kind: Literal["masked-tokens"] = "masked-tokens"
    """Which of the choices this is; the algorithm's `explore` decides it."""
    num_steps: int = Field(default=16, ge=1, le=MOST_STEPS)
    """Steps of a sample, shared out evenly among its blocks."""
    block: Count | None = None
    """Tokens of a block; one block is finished before the next is begun. All tokens are one block when not given."""
    schedule: Schedule = "linear"
    """Tokens a step: as many at each (`linear`), or few at first and ever more (`cosine`, MaskGIT's)."""
    guidance_scale: float = Field(default=1.0, ge=1, le=1_000)
    """Classifier-free guidance of the logits, in scoring as in drawing; 1 turns it off."""

    def check(self, chosen: Chosen) -> None:
        """Refuse choices that cannot work with each other or with these settings, with a ValueError."""
        if chosen.anchored:
            raise ValueError(
                "algorithm.credit.baseline: masked tokens have no anchor, a sample without exploration to hold its "
                "group against; take algorithm.credit.baseline=mean"
            )
        if chosen.coupled or any(not column.startswith("kl") for column in chosen.columns):
            raise ValueError(
                "algorithm.objective: of masked tokens there are log-probabilities and divergences; take "
                "algorithm.objective.kind=clipped, kl-masked or drpo"
            )

    def plan(self, length: int) -> "Plan":
        """Plan samples of `length` tokens; see `Plan.of`."""
        return Plan.of(length, self.num_steps, self.block, self.schedule)

    def facts(self) -> Mapping[str, str]:
        """Return what a model card says of the rollout beside its size."""
        blocks = f"blocks of {self.block}" if self.block else "one block"
        return {
            "Steps": f"{self.num_steps}, {self.schedule}, {blocks}",
            **({"Guidance": f"{self.guidance_scale:g}"} if self.guidance_scale > 1 else {}),
        }


class MaskedSampling(SamplingPart):
    """How samples are drawn in evaluations; what is not given is the rollout's."""

    kind: Literal["masked-tokens"] = "masked-tokens"
    """Which of the choices this is; the algorithm's `explore` decides it."""
    num_steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """Steps of a sample."""
    block: Count | None = None
    """Tokens of a block."""
    order: Order | None = None
    """Which tokens a step keeps."""
    temperature: float | None = Field(default=None, ge=0, le=1_000)
    """Logits are divided by it; 0 takes the likeliest token."""
    guidance_scale: float | None = Field(default=None, ge=1, le=1_000)
    """Classifier-free guidance of the logits."""


def check_truncation(name: str, top_k: int | None, top_p: float) -> None:
    """Refuse a truncation that would leave no token, with a ValueError."""
    if top_k is not None:
        check_number(f"top_k of {name}", top_k, 1, 10_000_000)
    if not 0 < top_p <= 1:
        raise ValueError(
            f"top_p of {name} must be above 0 and at most 1, not {top_p!r:.40}; 1 keeps every token, top_k=1 only the "
            "likeliest"
        )


@dataclass(frozen=True)
class Plan:
    """Which tokens of a sample may be drawn at each step, and how many are.

    Args:
        block: tokens of a block.
        counts: tokens that each step of a block draws.
        blocks: of a sample.
    """

    block: int
    counts: tuple[int, ...]
    blocks: int

    @classmethod
    def of(cls, length: int, num_steps: int, block: int | None, schedule: Schedule) -> "Plan":
        """Plan samples of `length` tokens.

        Raises:
            ValueError: blocks, steps and tokens do not divide.

        Examples: 24 tokens, 8 steps and blocks of 12 draw (3, 3, 3, 3) in each of 2 blocks; 16 tokens and 4 steps by
        the cosine (2, 3, 5, 6).
        """
        block = block or length
        if length % block:
            near = [size for size in range(1, length + 1) if length % size == 0]
            best = min(near, key=lambda size: abs(size - block))
            raise ValueError(
                f"rollout.block: {length} tokens cannot be cut into blocks of {block}; the nearest size is {best}"
            )
        blocks = length // block
        if num_steps % blocks:
            raise ValueError(
                f"rollout.num_steps: {num_steps} steps cannot be shared out among {blocks} blocks; take a multiple of "
                f"{blocks}"
            )
        steps = num_steps // blocks
        if steps > block:
            raise ValueError(
                f"rollout.num_steps: a block of {block} tokens has at most {block} steps, so a sample has at most "
                f"{length}, not {num_steps}"
            )
        return cls(block, tuple(_shared_out(block, steps, schedule)), blocks)

    @property
    def num_steps(self) -> int:
        """Steps of a sample."""
        return len(self.counts) * self.blocks

    @property
    def widest(self) -> int:
        """Tokens of a step, at most."""
        return max(self.counts)

    def at(self, step: int) -> tuple[slice, int]:
        """Return the tokens among which a step chooses, and how many it draws."""
        first = step // len(self.counts) * self.block
        return slice(first, first + self.block), self.counts[step % len(self.counts)]


def _shared_out(tokens: int, steps: int, schedule: Schedule) -> list[int]:
    """Return how many of the tokens each step draws, at least one."""
    if schedule == "linear":
        every, more = divmod(tokens, steps)
        return [every + (step < more) for step in range(steps)]
    left, counts = tokens, []
    for step in range(1, steps + 1):
        masked = math.floor(tokens * math.cos(math.pi / 2 * step / steps) + 1e-9)
        after = max(min(masked, left - 1), steps - step)
        counts.append(left - after)
        left = after
    return counts
