"""Settings of the flow process: how its samples are drawn, and which choices go together."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flashgrpo.processes.flow.choices import MOST_STEPS, Deterministic, Explore, Recorded, ScoreKind, Stochastic
from flashgrpo.processes.flow.reuse import FirstBlock, TaylorSeer
from flashgrpo.processes.flow.solvers import DpmSolver, Euler, UniPC
from flashgrpo.processes.settings import Chosen, RolloutPart, SamplingPart

Solver = Annotated[Euler | UniPC | DpmSolver, Field(discriminator="kind")]

SHORTCUTS: Mapping[str, Mapping[str, Any]] = {"fast": {"deterministic_steps": 5, "solver": {"kind": "unipc"}}}
"""Names for settings of a rollout that were measured together; see docs/speed.md."""


class RolloutConfig(RolloutPart):
    """How the samples of an update are drawn from a flow model."""

    kind: Literal["flow"] = "flow"
    """Which of the choices this is; the algorithm's `explore` decides it."""
    num_steps: int = Field(default=20, ge=2, le=MOST_STEPS)
    """Denoising steps, N."""
    guidance_scale: float = Field(default=4.5, ge=1, le=1_000)
    """Classifier-free guidance in the rollout, and in the update of recorded steps (re-noised samples have
    `score.guidance_scale`); evaluation takes it where it has none of its own. 1 turns it off."""
    guidance_scale_2: float | None = Field(default=None, ge=1, le=1_000)
    """Where the second of two experts computes (Wan 2.2 A14B); as the first when not given."""
    shortcuts: Literal["fast"] | None = None
    """Short for `deterministic_steps: 5` and `solver: {kind: unipc}`, which the bundled model loses nothing by; what is
    given beside it counts."""
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

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, settings: Any) -> Any:
        named = settings.get("shortcuts") if isinstance(settings, Mapping) else None
        return {**SHORTCUTS[named], **settings} if isinstance(named, str) and named in SHORTCUTS else settings

    @model_validator(mode="after")
    def _possible(self) -> "RolloutConfig":
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval is a pair of sigmas, low <= high, not {list(self.guidance_interval)}")
        return self

    def check(self, chosen: Chosen) -> None:
        """Refuse choices that cannot work with each other or with these settings, with a ValueError."""
        check_shared(chosen.coupled, chosen.anchored)
        check_score(chosen.explore, chosen.score, chosen.columns, self)
        self.check_shortcuts(chosen.held_between, chosen.frozen, chosen.offload, chosen.compiled)
        self.check_retain(chosen.held_between, chosen.offload, chosen.uses)

    def facts(self) -> Mapping[str, str]:
        """Return what a model card says of the rollout beside its size."""
        return {"Guidance": f"{self.guidance_scale:g} in training, {self.num_steps} steps"}

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


class SamplingConfig(SamplingPart):
    """How a video is drawn without noise at its steps: evaluation, and `flashgrpo sample`."""

    kind: Literal["flow"] = "flow"
    """Which of the choices this is; the algorithm's `explore` decides it."""
    num_steps: int = Field(default=50, ge=2, le=MOST_STEPS)
    """Denoising steps."""
    guidance_scale: float | None = Field(default=None, ge=1, le=1_000)
    """The rollout's when not given."""
    guidance_scale_2: float | None = Field(default=None, ge=1, le=1_000)
    """The rollout's when neither is given."""
    solver: Solver = Euler()
    """How a step without noise is computed."""

    def written_out(self, rollout: Any) -> Mapping[str, Any]:
        """Return the guidance of an evaluation, which is the rollout's where it has none of its own."""
        second = rollout.guidance_scale_2 if self.guidance_scale is None else None
        return {
            "guidance_scale": self.guidance_scale or rollout.guidance_scale,
            "guidance_scale_2": self.guidance_scale_2 or second,
        }

    def pipeline_arguments(self, rollout: Any) -> Mapping[str, Any]:
        """Return the steps and the guidance of an evaluation."""
        return {
            "num_inference_steps": self.num_steps or rollout.num_steps,
            "guidance_scale": self.guidance_scale or rollout.guidance_scale,
        }
