"""An algorithm is four choices and three numbers; the published ones are values of it.

The trainer never sees a name: everything below differs in what `steps`, `noise`, `grouping` and `weighting` say.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from flashgrpo.advantage import Grouping
from flashgrpo.loss import Rectified, Uniform
from flashgrpo.noise import ConstantSde, Cps, FlowSde, LinearSde
from flashgrpo.steps import AllSteps, OneStep, Window

Steps = Annotated[AllSteps | Window | OneStep, Field(discriminator="kind")]
Noise = Annotated[LinearSde | FlowSde | ConstantSde | Cps, Field(discriminator="kind")]
Weighting = Annotated[Uniform | Rectified, Field(discriminator="kind")]


@dataclass(frozen=True)
class Algorithm:
    """A GRPO variant for flow models.

    Args:
        steps: which denoising steps of a rollout are stochastic, and trained.
        noise: the transition density of those steps.
        grouping: over what the advantage's std is taken, and whether a group shares its initial noise.
        weighting: the factor of each transition's surrogate; `Rectified` divides lambda out (2605.15980).
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
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        bounds = self.clip_range if isinstance(self.clip_range, tuple) else (self.clip_range,)
        if not all(0 < bound < math.inf for bound in bounds):
            raise ValueError(f"clip_range must be greater than 0 and finite, not {self.clip_range}")
        if not 0 < self.adv_clip < math.inf:
            raise ValueError(f"adv_clip must be greater than 0 and finite, not {self.adv_clip}")
        if not 0 <= self.kl_coef < math.inf:
            raise ValueError(f"kl_coef must be at least 0 and finite, not {self.kl_coef}")


FLASH_GRPO = Algorithm(
    steps=OneStep(per="group", window=(0.0, 0.5)),
    noise=LinearSde(eta=1.0),
    grouping=Grouping(std="batch"),
    weighting=Rectified(over="window"),
)
FLOW_GRPO = Algorithm(
    steps=AllSteps(),
    noise=LinearSde(eta=1.0),
    grouping=Grouping(std="batch"),
    weighting=Uniform(),
)
FLOW_GRPO_FAST = Algorithm(
    steps=OneStep(per="group", window=(0.0, 0.5)),
    noise=LinearSde(eta=1.0),
    grouping=Grouping(std="batch", shared_noise=True),
    weighting=Uniform(),
)
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

PRESETS = {
    "flash-grpo": FLASH_GRPO,
    "flow-grpo": FLOW_GRPO,
    "flow-grpo-fast": FLOW_GRPO_FAST,
    "mix-grpo": MIX_GRPO,
    "dance-grpo": DANCE_GRPO,
}
