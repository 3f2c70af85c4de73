"""An algorithm is four choices, a ratio and three numbers; the published ones are values of it.

The trainer never sees a name: everything below differs in what `steps`, `noise`, `grouping` and `weighting` say.
docs/papers.md has each with its paper, equations and published settings.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

from pydantic import Field

from flashgrpo.learning.settings import Grouping
from flashgrpo.processes.flow.noise import ConstantSde, Cps, FlowSde, LinearSde
from flashgrpo.processes.flow.steps import AllSteps, OneStep, Window
from flashgrpo.processes.flow.weighting import NoiseLevel, NormalizedRatio, PlainRatio, Rectified, StepLength, Uniform

Steps = Annotated[AllSteps | Window | OneStep, Field(discriminator="kind")]
Noise = Annotated[LinearSde | FlowSde | ConstantSde | Cps, Field(discriminator="kind")]
Weighting = Annotated[Uniform | Rectified | NoiseLevel | StepLength, Field(discriminator="kind")]
Ratio = Annotated[PlainRatio | NormalizedRatio, Field(discriminator="kind")]


@dataclass(frozen=True)
class Algorithm:
    """A GRPO variant for flow models.

    Args:
        steps: which denoising steps of a rollout are stochastic, and trained.
        noise: the transition density of those steps.
        grouping: over what the advantage's std is taken, and whether a group shares its initial noise.
        weighting: the factor of each transition's surrogate; `Rectified` divides lambda out (2605.15980), `NoiseLevel`
            is TempFlow-GRPO's (2508.04324) and `StepLength` GRPO-Guard's (2510.22319).
        ratio: the importance ratio as it is, or GRPO-Guard's `NormalizedRatio`, which goes with any of the choices.
        clip_range: c of clip(ratio, 1 - c, 1 + c), or a pair (low, high). Log-probabilities are means over all latent
            dimensions, so ratios are very near 1 and c is small.
        adv_clip: advantages are clipped to +-adv_clip.
        kl_coef: weight of the KL divergence to the base model.
    """

    steps: Steps
    noise: Noise
    grouping: Grouping
    weighting: Weighting
    clip_range: float | tuple[float, float] = 1e-3
    adv_clip: float = 5.0
    kl_coef: float = 0.0
    ratio: Ratio = field(default_factory=PlainRatio)
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        bounds = self.clip_range if isinstance(self.clip_range, tuple) else (self.clip_range,)
        if not all(0 < bound < math.inf for bound in bounds):
            raise ValueError(f"clip_range must be greater than 0 and finite, not {self.clip_range}")
        if not 0 < self.adv_clip < math.inf:
            raise ValueError(f"adv_clip must be greater than 0 and finite, not {self.adv_clip}")
        if not 0 <= self.kl_coef < math.inf:
            raise ValueError(f"kl_coef must be at least 0 and finite, not {self.kl_coef}")


_GROUPED = OneStep(per="group", window=(0.0, 0.5))
_PER_SAMPLE = replace(_GROUPED, per="sample")

FLASH_GRPO = Algorithm(
    steps=_GROUPED,
    noise=LinearSde(eta=1.0),
    grouping=Grouping(std="batch"),
    weighting=Rectified(),
)
FLOW_GRPO = Algorithm(
    steps=AllSteps(),
    noise=LinearSde(eta=1.0),
    grouping=Grouping(std="batch"),
    weighting=Uniform(),
)
FLOW_GRPO_FAST = Algorithm(
    steps=_GROUPED,
    noise=LinearSde(eta=1.0),
    grouping=Grouping(std="batch", shared_noise=True),
    weighting=Uniform(),
)
FLOW_GRPO_FAST_2 = replace(FLOW_GRPO_FAST, steps=replace(_GROUPED, count=2))
MIX_GRPO = Algorithm(
    steps=Window(size=4, stride=1, every=25),
    noise=FlowSde(eta=0.7),
    grouping=Grouping(std="group", shared_noise=True),
    weighting=Uniform(),
)
DANCE_GRPO = Algorithm(
    steps=AllSteps(fraction=0.6),
    noise=ConstantSde(eta=0.3),
    grouping=Grouping(std="group", shared_noise=True),
    weighting=Uniform(),
)

# Flash-GRPO without one or both of its two ideas
ONE_STEP = replace(FLASH_GRPO, steps=_PER_SAMPLE, weighting=Uniform())
GROUPING_ONLY = replace(FLASH_GRPO, weighting=Uniform())
RECTIFICATION_ONLY = replace(FLASH_GRPO, steps=_PER_SAMPLE)

# Flash-GRPO with one choice made otherwise
FLASH_GRPO_WHOLE_GRID = replace(FLASH_GRPO, steps=replace(_GROUPED, window=(0.0, 1.0)))
FLASH_GRPO_STRATIFIED = replace(FLASH_GRPO, steps=replace(_GROUPED, draw="stratified"))
FLASH_GRPO_CPS = replace(FLASH_GRPO, noise=Cps(eta=0.8))
FLASH_GRPO_SHARED_NOISE = replace(FLASH_GRPO, grouping=replace(FLASH_GRPO.grouping, shared_noise=True))

PRESETS = {
    "flash-grpo": FLASH_GRPO,
    "flow-grpo": FLOW_GRPO,
    "flow-grpo-fast": FLOW_GRPO_FAST,
    "flow-grpo-fast-2": FLOW_GRPO_FAST_2,
    "mix-grpo": MIX_GRPO,
    "dance-grpo": DANCE_GRPO,
    "one-step": ONE_STEP,
    "grouping-only": GROUPING_ONLY,
    "rectification-only": RECTIFICATION_ONLY,
    "flash-grpo-whole-grid": FLASH_GRPO_WHOLE_GRID,
    "flash-grpo-stratified": FLASH_GRPO_STRATIFIED,
    "flash-grpo-cps": FLASH_GRPO_CPS,
    "flash-grpo-shared-noise": FLASH_GRPO_SHARED_NOISE,
}
