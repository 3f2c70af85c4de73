"""Settings that belong to no part, or to two."""

from typing import Literal

from pydantic import Field

from flashgrpo.processes.flow.settings import SamplingConfig
from flashgrpo.scoring.settings import HeldoutConfig
from flashgrpo.settings import Part


class PromptsConfig(Part):
    """Prompt files: .txt, a prompt a line; .jsonl, .csv, .parquet, whose columns beside `prompt` reach the rewards."""

    train: str
    heldout: str


class EvaluationConfig(HeldoutConfig, SamplingConfig):
    """Held-out prompts on fixed noise with a deterministic solver, paired with the base model."""


class CheckpointConfig(Part):
    """When the run is saved; every evaluation is followed by a checkpoint as well."""

    every: int = Field(default=10, ge=1)
    keep: int = Field(default=2, ge=1)
    """Number of the newest checkpoints that are kept, beside the best."""


class TrackingConfig(Part):
    """What is shown of a run in progress, and to whom."""

    progress: bool = True
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "swanlab", "mlflow"], ...] = ()
    """Trackers that get what metrics.jsonl and evaluations.jsonl get; each needs its package."""
    project: str = "flash-grpo"
    """The runs' common name there."""
    offline: bool = True
    """Nothing leaves this machine; a tracker with an account sends only where this is false."""
    profile: int = Field(default=0, ge=0)
    """Number of updates, after the first, that are traced by torch.profiler into profile/, for Perfetto or chrome://tracing."""
    preflight: Literal["refuse", "warn", "skip"] = "refuse"
    """What `train` does where the doctor's quick checks, before the first update, find the run unsound."""
