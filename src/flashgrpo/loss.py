"""Names that others import; they live in `learning/ratio.py` and `processes/flow/weighting.py`."""

from flashgrpo.learning.ratio import policy_losses, ratio_metrics
from flashgrpo.processes.flow.weighting import (
    NoiseLevel,
    NormalizedRatio,
    PlainRatio,
    Rectified,
    StepLength,
    Uniform,
)

__all__ = [
    "NoiseLevel",
    "NormalizedRatio",
    "PlainRatio",
    "Rectified",
    "StepLength",
    "Uniform",
    "policy_losses",
    "ratio_metrics",
]
