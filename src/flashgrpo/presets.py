"""An algorithm is a value: how it explores, what it scores, how samples are compared, what is minimised, and who draws.

The trainer never sees a name: everything below differs in what `explore`, `score`, `credit` and `objective` say.
docs/papers.md has each with its paper, equations and published settings.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

from pydantic import Field

from flashgrpo.learning.objective import AnyObjective, Clipped, Competing, Contrast, KlMasked
from flashgrpo.learning.settings import AnyBehaviour, Averaged, Credit, Current, Frozen
from flashgrpo.processes.flow.choices import Deterministic, Explore, Recorded, Renoised, ScoreKind, Stochastic
from flashgrpo.processes.flow.noise import ConstantSde, Cps, FlowSde, LinearSde
from flashgrpo.processes.flow.steps import AllSteps, OneStep, Window
from flashgrpo.processes.flow.weighting import Rectified
from flashgrpo.processes.programs.settings import CallTokens, ProgramRuns
from flashgrpo.processes.streaming.settings import (
    Energy,
    NoisedBlock,
    OneLevel,
    Routing,
    StreamExplore,
    StreamScore,
    Transition,
)
from flashgrpo.processes.tokens.masked.settings import UnmaskedSteps, Unmasking
from flashgrpo.processes.tokens.uniform.settings import TokensAtTimes, UniformTokens
from flashgrpo.settings import default_kind

AnyExplore = Annotated[
    Explore | StreamExplore | Unmasking | UniformTokens | ProgramRuns,
    Field(discriminator="kind"),
    default_kind("stochastic"),
]
AnyScore = Annotated[
    ScoreKind | StreamScore | UnmaskedSteps | TokensAtTimes | CallTokens,
    Field(discriminator="kind"),
    default_kind("recorded"),
]


@dataclass(frozen=True)
class Algorithm:
    """A policy optimisation algorithm: process choices (`explore`, `score`) times what every process shares.

    Args:
        explore: how the samples of a group come to differ; it decides the process that the algorithm is of.
        score: what is replayed and judged.
        credit: how rewards become advantages.
        objective: what is minimised.
        behaviour: whose weights draw.
    """

    explore: AnyExplore
    score: AnyScore = field(default_factory=Recorded)
    credit: Credit = field(default_factory=Credit)
    objective: AnyObjective = field(default_factory=Clipped)
    behaviour: AnyBehaviour = field(default_factory=Current)
    __pydantic_config__: ClassVar = {"extra": "forbid"}


_GROUPED = OneStep(per="group", window=(0.0, 0.5))
_PER_SAMPLE = replace(_GROUPED, per="sample")

_OVER_BATCH = Credit(std="batch")

FLASH_GRPO = Algorithm(Stochastic(_GROUPED, LinearSde(eta=1.0)), Recorded(Rectified()), _OVER_BATCH)
FLOW_GRPO = Algorithm(Stochastic(AllSteps(), LinearSde(eta=1.0)), credit=_OVER_BATCH)
FLOW_GRPO_FAST = Algorithm(Stochastic(_GROUPED, LinearSde(eta=1.0), shared_noise=True), credit=_OVER_BATCH)
FLOW_GRPO_FAST_2 = Algorithm(
    Stochastic(replace(_GROUPED, count=2), LinearSde(eta=1.0), shared_noise=True), credit=_OVER_BATCH
)
MIX_GRPO = Algorithm(Stochastic(Window(size=4, stride=1, every=25), FlowSde(eta=0.7), shared_noise=True))
DANCE_GRPO = Algorithm(Stochastic(AllSteps(fraction=0.6), ConstantSde(eta=0.3), shared_noise=True))

# Several optimizer steps for a rollout, masked by divergence where others clip ratios
FLOW_DPPO = Algorithm(Stochastic(AllSteps(), FlowSde(eta=0.7)), credit=_OVER_BATCH, objective=KlMasked(tau=1e-5))
FLASH_DPPO = replace(FLASH_GRPO, objective=KlMasked(tau=1e-5))

# Finished samples noised again: no stochastic step, any solver, no guidance in the update
AWM = Algorithm(
    Deterministic(),
    Renoised(times=6, draw="grid", window=(0.01, 0.9), weight="ghuber"),
    Credit(std="batch", rescale="clip"),
    Clipped(clip_range=1.0, kl_coef=1e-3, average_coef=1.0),
    Averaged(slope=0.001, ceiling=0.3, draws=False),
)
V_GRPO = Algorithm(Deterministic(), Renoised(shared=True), Credit(clip=3.0, bend="soft"), Clipped(clip_range=0.2))
DIFFUSION_NFT = Algorithm(
    Deterministic(), Renoised(times=None, draw="shuffled"), _OVER_BATCH, Contrast(kl_coef=1e-4), Averaged()
)

# Streaming video: branches that see other old frames, and Flash-GRPO's idea on the same model
KVPO = Algorithm(
    Routing(),
    Energy(),
    Credit(baseline="anchor", clip=2.5, unsafe_weight=0.5),
    Competing(clip_range=(0.1, 0.2), tau=0.01, kl_coef=0.05),
    Frozen(2),
)
FLASH_STREAM = Algorithm(OneLevel(), Transition())
STREAM_NFT = Algorithm(OneLevel(), NoisedBlock(), _OVER_BATCH, Contrast(kl_coef=1e-4), Averaged())

# Masked tokens: the steps of a sample in the states that they have seen
AGRPO = Algorithm(
    Unmasking(temperature=0.6, top_k=150, top_p=0.99),
    UnmaskedSteps(steps=24),
    Credit(std="none", combine="raw", clip=1e6),
    Clipped(clip_range=0.2),
)

# Uniform tokens: the finished sample, noised again to some times of the sampler
UDM_GRPO = Algorithm(UniformTokens(), TokensAtTimes(), Credit(), Clipped(clip_range=1e-4, kl_coef=0.05))

# Programs of a language model: calls compared by module and number, and phases of a completion judged apart
_RAW = Credit(std="none", combine="raw", clip=1e6)
MM_GRPO = Algorithm(
    ProgramRuns(temperature=0.6), CallTokens(length="sequence"), _RAW, Clipped(clip_range=(0.2, 0.28), kl_coef=0.04)
)
F_GRPO = Algorithm(ProgramRuns(), CallTokens("phase", "sequence"), _RAW, Clipped(clip_range=0.2))

# Flash-GRPO without one or both of its two ideas
RECTIFICATION_ONLY = replace(FLASH_GRPO, explore=Stochastic(_PER_SAMPLE, LinearSde(eta=1.0)))
ONE_STEP = replace(RECTIFICATION_ONLY, score=Recorded())
GROUPING_ONLY = replace(FLASH_GRPO, score=Recorded())

# Flash-GRPO with one choice made otherwise
FLASH_GRPO_WHOLE_GRID = replace(
    FLASH_GRPO, explore=Stochastic(replace(_GROUPED, window=(0.0, 1.0)), LinearSde(eta=1.0))
)
FLASH_GRPO_STRATIFIED = replace(
    FLASH_GRPO, explore=Stochastic(replace(_GROUPED, draw="stratified"), LinearSde(eta=1.0))
)
FLASH_GRPO_CPS = replace(FLASH_GRPO, explore=Stochastic(_GROUPED, Cps(eta=0.8)))
FLASH_GRPO_SHARED_NOISE = replace(FLASH_GRPO, explore=Stochastic(_GROUPED, LinearSde(eta=1.0), shared_noise=True))

PRESETS = {
    "flash-grpo": FLASH_GRPO,
    "flow-grpo": FLOW_GRPO,
    "flow-grpo-fast": FLOW_GRPO_FAST,
    "flow-grpo-fast-2": FLOW_GRPO_FAST_2,
    "mix-grpo": MIX_GRPO,
    "dance-grpo": DANCE_GRPO,
    "flow-dppo": FLOW_DPPO,
    "flash-dppo": FLASH_DPPO,
    "awm": AWM,
    "v-grpo": V_GRPO,
    "diffusion-nft": DIFFUSION_NFT,
    "agrpo": AGRPO,
    "udm-grpo": UDM_GRPO,
    "kvpo": KVPO,
    "flash-stream": FLASH_STREAM,
    "stream-nft": STREAM_NFT,
    "mmgrpo": MM_GRPO,
    "f-grpo": F_GRPO,
    "one-step": ONE_STEP,
    "grouping-only": GROUPING_ONLY,
    "rectification-only": RECTIFICATION_ONLY,
    "flash-grpo-whole-grid": FLASH_GRPO_WHOLE_GRID,
    "flash-grpo-stratified": FLASH_GRPO_STRATIFIED,
    "flash-grpo-cps": FLASH_GRPO_CPS,
    "flash-grpo-shared-noise": FLASH_GRPO_SHARED_NOISE,
}
