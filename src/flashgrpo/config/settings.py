"""Settings that belong to no part, or to two."""

from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler

from flashgrpo.processes.flow.settings import RolloutConfig, SamplingConfig
from flashgrpo.processes.programs.settings import ProgramRollout, ProgramSampling
from flashgrpo.processes.streaming.settings import StreamRollout, StreamSampling
from flashgrpo.processes.tokens.masked.settings import MaskedRollout, MaskedSampling
from flashgrpo.processes.tokens.uniform.settings import UniformRollout, UniformSampling
from flashgrpo.scoring.settings import HeldoutConfig
from flashgrpo.settings import MANY, Count, Part, PathText


class PromptsConfig(Part):
    """Prompt files: .txt, a prompt a line; .jsonl, .csv, .parquet, whose columns beside `prompt` reach the rewards."""

    train: PathText
    """Prompts to train on, or `datasets:NAME` of the hub; `datasets:NAME:SPLIT` where the split is not train."""
    heldout: PathText
    """Prompts to evaluate on, which training never sees."""


class EvaluationConfig(HeldoutConfig, SamplingConfig):
    """Held-out prompts on fixed noise with a deterministic solver, paired with the base model."""


class StreamEvaluation(HeldoutConfig, StreamSampling):
    """Held-out prompts on fixed noise, paired with the base model, by a streaming model."""


class MaskedEvaluation(HeldoutConfig, MaskedSampling):
    """Held-out prompts on fixed random numbers, paired with the base model, by a model that fills masks."""


class UniformEvaluation(HeldoutConfig, UniformSampling):
    """Held-out prompts on fixed random numbers, paired with the base model, by a model of uniform tokens."""


class ProgramEvaluation(HeldoutConfig, ProgramSampling):
    """Held-out prompts on fixed random numbers, paired with the base model, by a program of a language model."""


class ByKind:
    """Lets a JSON schema accept settings that name no `kind`, which the algorithm decides, and that several fit."""

    def __get_pydantic_json_schema__(self, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        schema["anyOf"] = schema.pop("oneOf")
        return schema


AnyRollout = Annotated[
    RolloutConfig | StreamRollout | MaskedRollout | UniformRollout | ProgramRollout,
    Field(discriminator="kind"),
    ByKind(),
]
AnyEvaluation = Annotated[
    EvaluationConfig | StreamEvaluation | MaskedEvaluation | UniformEvaluation | ProgramEvaluation,
    Field(discriminator="kind"),
    ByKind(),
]


class CheckpointConfig(Part):
    """When the run is saved; before every evaluation there is a checkpoint as well."""

    every: Count = 10
    """Updates between two checkpoints."""
    keep: Count = 2
    """Number of the newest checkpoints that are kept, beside the best."""


class TrackingConfig(Part):
    """What is shown of a run in progress, and to whom."""

    progress: bool = True
    """Show a bar, and a line for each evaluation."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "swanlab", "mlflow"], ...] = ()
    """Trackers that get what metrics.jsonl and evaluations.jsonl get; each needs its package."""
    project: str = "flash-grpo"
    """The runs' common name there."""
    offline: bool = True
    """Nothing leaves this machine; a tracker with an account sends only where this is false."""
    profile: int = Field(default=0, ge=0, le=MANY)
    """Number of updates, after the first, that are traced by torch.profiler into profile/, for Perfetto or chrome://tracing."""
    preflight: Literal["refuse", "warn", "skip"] = "refuse"
    """What `train` does where the doctor's quick checks, before the first update, find the run unsound."""
