"""Settings of the process of uniform tokens: its path, how its samples are drawn, and what is scored of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from flashgrpo.processes.settings import Chosen, RolloutPart, SamplingPart
from flashgrpo.seeds import keyed_bits
from flashgrpo.settings import FORBID_EXTRA, check_number

UNIFORM = "uniform-tokens"
MOST_STEPS = 10_000

Jumps = Literal["difference", "derivative"]


@dataclass(frozen=True)
class Metric:
    """Noise by distance: p_t(x | x1) = softmax_x( -beta(t) d(x, x1) ), with beta(t) = c (t / (1 - t))^alpha.

    d is the squared distance of normalised code embeddings, from 0 to 4; at t = 0 all tokens are equally likely, at
    t = 1 the clean one is alone. arXiv 2604.18518, and 2510.24717 for the model (URSA).

    Args:
        alpha: how early nearness to the clean token begins to count; the lower the earlier.
        c: scales beta.
    """

    alpha: float = 0.9
    c: float = 3.0
    kind: Literal["metric"] = "metric"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        check_number("alpha of Metric", self.alpha, 0.01, 100)
        check_number("c of Metric", self.c, 1e-6, 1e6)


@dataclass(frozen=True)
class Mixture:
    """Noise without distances: p_t(x | x1) = t [x = x1] + (1 - t) / V, a clean token or any."""

    kind: Literal["mixture"] = "mixture"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA


AnyPath = Annotated[Metric | Mixture, Field(discriminator="kind")]


@dataclass(frozen=True)
class UniformTokens:
    """Explore by drawing: the tokens of each sample begin at random, and guesses and jumps are drawn at every step."""

    kind: Literal["uniform-tokens"] = "uniform-tokens"
    process: ClassVar[str] = UNIFORM
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA


@dataclass(frozen=True)
class TokensAtTimes:
    """Score tokens at some times of the grid, by the mean over tokens of their log-probability there.

    Args:
        times: steps of the rollout's grid that are trained, one after the other.
        starts: the first of them is one of so many, from the first step on; each group draws its own.
        state: the tokens that the network is shown: the finished sample, noised again to that time ("forward"), or
            those of the sampler at that step ("sampler").
        action: the tokens that are scored: the finished sample ("clean"), or the guess of that step ("guess").
    """

    times: int = 3
    starts: int = 3
    state: Literal["forward", "sampler"] = "forward"
    action: Literal["clean", "guess"] = "clean"
    kind: Literal["tokens-at-times"] = "tokens-at-times"
    process: ClassVar[str] = UNIFORM
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        for name in ("times", "starts"):
            check_number(f"{name} of TokensAtTimes", getattr(self, name), 1, MOST_STEPS)

    @property
    def follows_sampler(self) -> bool:
        """Whether a unit needs what the sampler had at its step."""
        return self.state == "sampler" or self.action == "guess"

    def steps(self, seed: int, update: int, group: int) -> range:
        """Return the trained steps of a prompt group."""
        first = keyed_bits("trained steps", seed, update, group) % self.starts
        return range(first, first + self.times)


class UniformRollout(RolloutPart):
    """How the samples of an update are drawn from uniform tokens."""

    kind: Literal["uniform-tokens"] = "uniform-tokens"
    """Which of the choices this is; the algorithm's `explore` decides it."""
    num_steps: int = Field(default=10, ge=2, le=MOST_STEPS)
    """Steps of the sampler; at the last every token becomes the network's guess."""
    shift: float | None = Field(default=None, ge=0.001, le=1_000)
    """Shift of the grid of times: above 1 more of them are near noise; the checkpoint's own when not given."""
    path: AnyPath | None = None
    """How tokens are noised; the checkpoint's own when not given."""
    jumps: Jumps = "difference"
    """Whether a step takes the rate of jumps at its beginning times its length (`derivative`, as URSA does, whose first
    step is then inert), or the rate integrated over the step (`difference`)."""

    def check(self, chosen: Chosen) -> None:
        """Refuse choices that cannot work with each other or with these settings, with a ValueError."""
        if chosen.anchored:
            raise ValueError(
                "algorithm.credit.baseline: uniform tokens have no anchor, a sample without exploration to hold its "
                "group against; take algorithm.credit.baseline=mean"
            )
        if chosen.coupled or any(not column.startswith("kl") or column == "kl_old" for column in chosen.columns):
            raise ValueError(
                "algorithm.objective: of uniform tokens there are log-probabilities and their divergence from the base "
                "model or the average; take algorithm.objective.kind=clipped"
            )
        score = chosen.score
        if isinstance(score, TokensAtTimes) and score.starts + score.times - 1 > self.num_steps:
            raise ValueError(
                f"algorithm.score: {score.times} trained steps from one of the first {score.starts} on are more than "
                f"rollout.num_steps {self.num_steps} holds; take fewer times or starts, or more steps"
            )

    def facts(self) -> Mapping[str, str]:
        """Return what a model card says of the rollout beside its size."""
        return {"Steps": f"{self.num_steps}, jumps by {self.jumps}"}


class UniformSampling(SamplingPart):
    """How evaluation, and `flashgrpo sample`, draw from uniform tokens."""

    kind: Literal["uniform-tokens"] = "uniform-tokens"
    """Which of the choices this is; the algorithm's `explore` decides it."""
    num_steps: int = Field(default=25, ge=2, le=MOST_STEPS)
    """Steps of the sampler."""
    jumps: Jumps | None = None
    """The rollout's when not given."""

    def written_out(self, rollout: Any) -> Mapping[str, Any]:
        """Return the jumps of an evaluation, which are the rollout's where it has none of its own."""
        return {"jumps": self.jumps or rollout.jumps}

    def pipeline_arguments(self, rollout: Any) -> Mapping[str, Any]:
        """Return the steps of an evaluation, and that it has no guidance."""
        return {"num_inference_steps": self.num_steps, "guidance_scale": 1}


def grid(num_steps: int, shift: float) -> list[float]:
    """Return the times of a sampler's steps and their end, T + 1 of them: t = u / (u + shift (1 - u)), u = i / T.

    Example: with 4 steps and shift 3 they are 0, 0.1, 0.25, 0.5 and 1.
    """
    fractions = [i / num_steps for i in range(num_steps + 1)]
    return [u / (u + shift * (1 - u)) for u in fractions]
