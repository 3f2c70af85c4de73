"""Settings of programs: what is run, how its calls are drawn, and what is scored of them. Free of torch."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from flashgrpo.processes.settings import Chosen, RolloutPart, SamplingPart
from flashgrpo.settings import DEFAULT_ADAPTERS, FORBID_EXTRA, LARGEST, Count, PathText, Positive, check_number

PROGRAMS = "programs"
MOST_CALLS = 10_000


def _adapters_name(name: str) -> str:
    """Return a name that can be one of a folder on every file system, and is no option of a command."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        raise ValueError(f"{name!r:.80} can be no name of adapters; take small letters, digits, - and _")
    return name


AdaptersName = Annotated[str, AfterValidator(_adapters_name)]


@dataclass(frozen=True)
class ProgramRuns:
    """Explore by running the program anew for each sample, with other tokens drawn in its calls (mmGRPO, 2508.04660).

    A token is drawn by the logits divided by `temperature`, of which `top_k` and then `top_p` leave the largest.

    Args:
        temperature: logits are divided by it, in scoring as in drawing.
        top_k: candidates of a token, at most; each one's ids are kept for scoring.
        top_p: of these, the likeliest that have this probability together.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    kind: Literal["program-runs"] = "program-runs"
    process: ClassVar[str] = PROGRAMS
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        check_number("temperature of ProgramRuns", self.temperature, 0.001, 1_000)
        check_number("top_p of ProgramRuns", self.top_p, 1e-6, 1)
        if self.top_k is not None:
            check_number("top_k of ProgramRuns", self.top_k, 1, 10_000_000)


@dataclass(frozen=True)
class CallTokens:
    """Score the calls of a program again, each given its own input alone: what earlier calls wrote is environment.

    Args:
        term: what one ratio judges: a "token" (mmGRPO), or all tokens of a "phase" together (F-GRPO, 2605.12995); a
            completion that is not cut into phases is one.
        length: how tokens count. Terms that are tokens: each alike over the whole update ("tokens": DAPO, 2503.14476),
            each completion alike ("sequence": GRPO, 2402.03300), or divided by `model.length` ("maximum": Dr. GRPO,
            2503.20783). Terms that are phases: the score is the sum of the log-probabilities of its tokens ("tokens"),
            their mean ("sequence": GSPO, 2507.18071), or the sum divided by `model.length` ("maximum").
    """

    term: Literal["token", "phase"] = "token"
    length: Literal["tokens", "sequence", "maximum"] = "tokens"
    kind: Literal["call-tokens"] = "call-tokens"
    process: ClassVar[str] = PROGRAMS
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA


class ProgramRollout(RolloutPart):
    """How a program is run for the samples of an update."""

    kind: Literal["programs"] = "programs"
    """Which of the choices this is; the algorithm's `explore` decides it."""
    program: PathText = "flashgrpo.processes.programs.plain:answer"
    """`package.module:function` or `path/to/file.py:function` with `function(prompt, call, **columns) -> text`, where
    `call(module, text)` returns what the model writes. It is code that the run executes."""
    max_calls: int = Field(default=16, ge=1, le=MOST_CALLS)
    """Calls of a run, at most; one that wants more has failed."""
    failure_reward: float = Field(default=-1.0, ge=-LARGEST, le=LARGEST)
    """Every reward of a run that has failed: its program raised ValueError or LookupError, as parsers do, or asked for
    too much."""
    patience: Positive = 60.0
    """Seconds that a program may take from one call to the next; one that takes longer ends the training."""
    phases: dict[str, str] | list[str] = Field(default_factory=dict)
    """Channel -> the text behind which its part of a completion begins; what stands before is the first channel's. Or
    the channels alone, in order, where `cut` says where they begin."""
    cut: PathText | None = None
    """`package.module:function` or `path/to/file.py:function` with `function(text) -> list`: the character at which
    each phase of a completion begins, rising from 0, and fewer where phases do not come. It is code that the run
    executes."""
    adapters: dict[str, AdaptersName] = Field(default_factory=dict)
    """Module -> the name of the LoRA adapters that compute its calls, in small letters; modules of one name
    share them. Without any, all calls are computed by one set of adapters."""
    other_modules: Literal["share", "refuse"] = "share"
    """What calls of modules that `adapters` does not name are computed by: adapters of the name `default`, which they
    share. With `refuse` there are none unless a module names them, and such a call ends the training."""
    environment: PathText | None = None
    """A recipe whose model makes a video or an image of what the program returns; rewards look at that. The model is
    not trained."""
    environment_steps: Count | None = None
    """Denoising steps of the environment's model; as its recipe evaluates when not given."""
    environment_guidance: float | None = Field(default=None, ge=1, le=1_000)
    """Its classifier-free guidance; as its recipe evaluates when not given. The more of it, the more of a video is due
    to its text, and the less of the rewards to noise."""

    def check(self, chosen: Chosen) -> None:
        """Refuse choices that cannot work with each other or with these settings, with a ValueError."""
        if chosen.anchored:
            raise ValueError(
                "algorithm.credit.baseline: programs have no anchor, a run without exploration to hold its group "
                "against; take algorithm.credit.baseline=mean"
            )
        if chosen.coupled or any(not column.startswith("kl") for column in chosen.columns):
            raise ValueError(
                "algorithm.objective: of programs there are log-probabilities and divergences; take "
                "algorithm.objective.kind=clipped"
            )
        if self.adapters and not chosen.frozen:
            raise ValueError(
                "rollout.adapters: full training has none; take model.train.kind=lora, or leave this setting out"
            )
        if self.other_modules == "refuse" and not self.adapters:
            raise ValueError("rollout.other_modules: rollout.adapters names no module; name those that a program calls")
        for name in ("environment_steps", "environment_guidance"):
            if self.environment is None and getattr(self, name) is not None:
                raise ValueError(
                    f"rollout.{name}: there is no environment; give rollout.environment, or leave this out"
                )
        if isinstance(self.phases, list) != (self.cut is not None):
            raise ValueError(
                "rollout.phases: a list of channels is cut by the function that rollout.cut names, a mapping from "
                "channels to texts by these; give one of both"
            )
        if len(set(self.phases)) < len(self.phases):
            raise ValueError("rollout.phases: each channel stands there once")
        if any(not tag for tag in self.tags.values()):
            raise ValueError("rollout.phases: a phase begins behind a text that is not empty")

    @property
    def tags(self) -> dict[str, str]:
        """Return channel -> the text behind which it begins; empty where a function cuts."""
        return self.phases if isinstance(self.phases, dict) else {}

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Return the names of all adapters, each once, those that other modules share first."""
        shared = (DEFAULT_ADAPTERS,) if self.other_modules == "share" else ()
        return tuple(dict.fromkeys((*shared, *self.adapters.values())))

    def absolute(self, call: Callable[[str], str]) -> "ProgramRollout":
        """Return the same, with the files of code and the recipe of the environment by their absolute paths."""
        changes = {name: (value := getattr(self, name)) and call(value) for name in ("program", "environment", "cut")}
        return self.model_copy(update=changes)

    def facts(self) -> Mapping[str, str]:
        """Return what a model card says of the rollout beside its size."""
        return {
            "Program": self.program,
            **({"Phases": ", ".join(self.phases)} if self.phases else {}),
            **({"Adapters": ", ".join(self.adapter_names)} if self.adapters else {}),
        }


class ProgramSampling(SamplingPart):
    """How programs are run in evaluations; what is not given is the rollout's."""

    kind: Literal["programs"] = "programs"
    """Which of the choices this is; the algorithm's `explore` decides it."""
    temperature: float | None = Field(default=None, ge=0, le=1_000)
    """Logits are divided by it; 0 takes the likeliest token."""
