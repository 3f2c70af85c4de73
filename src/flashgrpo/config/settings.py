"""Settings that belong to no part, or to two."""

from flashgrpo.processes.flow.settings import SamplingConfig
from flashgrpo.scoring.settings import HeldoutConfig
from flashgrpo.settings import Part


class PromptsConfig(Part):
    """Prompt files: .txt, a prompt a line; .jsonl, .csv, .parquet, whose columns beside `prompt` reach the rewards."""

    train: str
    heldout: str


class EvaluationConfig(HeldoutConfig, SamplingConfig):
    """Held-out prompts on fixed noise with a deterministic solver, paired with the base model."""
