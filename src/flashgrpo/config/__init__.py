"""A run is one YAML file: RunConfig, and the sentences that bad input gets.

`reading.py` reads files and `key=value` overrides, pydantic validates the result. Every key is used; an unknown one
is refused with the nearest known name.
"""

import contextlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from flashgrpo.config.algorithm import Written, algorithm_from, read_tree
from flashgrpo.config.explain import explain, truths
from flashgrpo.config.processes import check_one_process, of_its_process
from flashgrpo.config.reading import read_recipe, write_yaml
from flashgrpo.config.recipe import find_recipe, merge_choices, parse_override
from flashgrpo.config.schema import typed_text
from flashgrpo.config.settings import (
    AnyEvaluation,
    AnyRollout,
    CheckpointConfig,
    EvaluationConfig,
    PromptsConfig,
    TrackingConfig,
)
from flashgrpo.distributed.settings import ParallelConfig
from flashgrpo.errors import UserError
from flashgrpo.learning.settings import OptimConfig, check_average
from flashgrpo.models.settings import Lora, ModelConfig
from flashgrpo.presets import PRESETS, Algorithm
from flashgrpo.processes.flow.settings import RolloutConfig
from flashgrpo.processes.settings import Chosen
from flashgrpo.scoring.settings import RewardConfig, check_rewards
from flashgrpo.settings import MANY, Count, Part, PathText


def without_null(value: Any) -> Any:
    """Return a mapping without the entries that are null."""
    return {key: entry for key, entry in value.items() if entry is not None} if isinstance(value, Mapping) else value


class RunConfig(Part):
    """All settings of a run."""

    out: PathText
    """The run directory."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the prompts, the steps and the noise."""
    updates: Count
    """Rollouts, each followed by its optimizer steps."""
    model: ModelConfig
    """The checkpoint, the size of its videos, and what is trained of it."""
    algorithm: Annotated[Algorithm, BeforeValidator(algorithm_from, json_schema_input_type=Written)] = PRESETS[
        "flash-grpo"
    ]
    """A preset's name, or changes to one."""
    rollout: AnyRollout = RolloutConfig()
    """Prompts, samples, steps and guidance of an update."""
    optim: OptimConfig = OptimConfig()
    """AdamW, micro-batches, and the moving average."""
    prompts: PromptsConfig
    """The files of prompts."""
    rewards: Annotated[dict[str, RewardConfig], BeforeValidator(without_null)] = Field(min_length=1)
    """Name -> reward; `rewards.NAME=null` takes one out of a recipe."""
    evaluation: AnyEvaluation = EvaluationConfig()
    """How held-out prompts are scored, and how often."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """How often the run is saved."""
    parallel: ParallelConfig = ParallelConfig()
    """How the processes of the run divide its work."""
    tracking: TrackingConfig = TrackingConfig()
    """What is shown of a run, and the checks before it."""

    @model_validator(mode="before")
    @classmethod
    def _of_one_process(cls, tree: Any) -> Any:
        return of_its_process(tree)

    @model_validator(mode="after")
    def _parts_fit(self) -> "RunConfig":
        """Each part says what it cannot go with; here they only meet."""
        check_rewards(self.rewards)
        samples = self.rollout.prompts * (self.rollout.group_size + self.algorithm.credit.anchored)
        if samples > MANY:
            raise ValueError(f"rollout.prompts: an update has {MANY:,} samples at most, not {samples:,}")
        coupled = self.algorithm.objective.coupled
        self.optim.check(samples, self.updates, self.rollout.prompts if coupled else None)
        self.model.check(self.sharded)
        frozen, held_between = isinstance(self.model.train, Lora), self.sharded or self.parallel.context > 1
        algorithm, objective = self.algorithm, self.algorithm.objective
        check_average(objective.average_coef, algorithm.behaviour)
        check_one_process(algorithm, rollout=self.rollout.kind, evaluation=self.evaluation.kind)
        if objective.needs_probabilities and not self.rollout.scores_are_probabilities:
            raise ValueError(
                f"algorithm.objective: {objective.kind} weighs ratios by the probability of a token, and scores of "
                f"{self.rollout.kind} are no log-probabilities of tokens; take kind=clipped or kl-masked"
            )
        self.rollout.check(
            Chosen(
                algorithm.explore,
                algorithm.score,
                objective.columns,
                coupled,
                algorithm.credit.anchored,
                self.uses,
                held_between,
                frozen,
                self.model.offload,
                self.model.compile,
            )
        )
        return self

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the network in training, between processes or in another type than it computes in."""
        return self.parallel.shard > 1 or self.model.compute_dtype is not None

    @property
    def uses(self) -> int:
        """How often a rollout is told that its units are replayed; where other weights draw, always more than once."""
        return max(self.optim.passes * self.optim.minibatches, 1 + self.algorithm.behaviour.draws)

    def with_absolute_paths(self) -> "RunConfig":
        """Return the same run, whatever folder it is started from."""

        def absolute(path: str) -> str:
            kind, colon, name = path.rpartition("datasets:")  # the name of a data set may be a folder
            with contextlib.suppress(OSError):  # too long for a path: it is none
                if Path(name).exists():
                    return f"{kind}{colon}{Path(name).absolute()}"
            return path

        def absolute_call(call: str) -> str:
            file, colon, function = call.rpartition(":")
            return f"{absolute(file)}{colon}{function}" if file.endswith(".py") else absolute(call)

        rewards = {name: r.model_copy(update={"call": absolute_call(r.call)}) for name, r in self.rewards.items()}
        prompts = PromptsConfig(train=absolute(self.prompts.train), heldout=absolute(self.prompts.heldout))
        cache = self.model.condition_cache
        generator, adapters = self.model.generator, self.model.adapters
        folders = {
            "path": absolute(self.model.path),
            "generator": generator and absolute(generator),
            "adapters": adapters and absolute(adapters),
            "condition_cache": cache and str(Path(cache).absolute()),
        }
        model = self.model.model_copy(update=folders)
        changes = {"out": str(Path(self.out).absolute()), "model": model, "prompts": prompts, "rewards": rewards}
        changes["rollout"] = self.rollout.absolute(absolute_call)
        return self.model_copy(update=changes)

    @classmethod
    def load(cls, recipe: str | Path, overrides: Sequence[str] = ()) -> "RunConfig":
        """Read a recipe (a file, or the name of one that ships with the package) and apply `key=value` overrides.

        Raises:
            UserError: the file is missing or no YAML mapping, or a setting is unknown or out of range.
        """
        path = find_recipe(str(recipe))
        layers = [(str(path), read_tree(read_recipe(path), str(path)))]
        for override in overrides:
            source = f"override {override!r:.200}"
            layers.append((source, merge_choices(layers[-1][1], read_tree(read_override(override), source))))
        return cls._validated(layers)

    @classmethod
    def parse(cls, tree: Mapping[Any, Any], source: str) -> "RunConfig":
        """Validate settings; what is wrong becomes a `UserError` that names `source`, the keys and the fix."""
        return cls._validated([(source, read_tree(tree, source))])

    @classmethod
    def _validated(cls, layers: Sequence[tuple[str, Mapping[Any, Any]]]) -> "RunConfig":
        config = None
        with contextlib.suppress(ValidationError):
            config = cls.model_validate(layers[-1][1])
        if config is None or truths(layers[-1][1], recipe_schema()):
            raise UserError(explain(layers, cls.model_validate, recipe_schema()))
        return config

    def to_yaml(self) -> str:
        """Return the resolved settings; loading the text again gives an equal RunConfig."""
        return write_yaml(self.model_dump(mode="json"))


@cache
def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of what a recipe may hold."""
    return RunConfig.model_json_schema()


def read_override(override: str) -> dict[Any, Any]:
    """Read `key=value` as nested settings: what was typed where the setting is text, and YAML where it is another.

    Raises:
        UserError: it has another form.
    """
    return parse_override(override, lambda keys, typed: typed_text(keys, typed, recipe_schema()))
