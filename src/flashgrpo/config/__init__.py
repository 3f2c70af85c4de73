"""A run is one YAML file: RunConfig, and the sentences that bad input gets.

OmegaConf reads files and `key=value` overrides, pydantic validates the result. Every key is used; an unknown one
is refused with the nearest known name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from flashgrpo.config.algorithm import Written, algorithm_from, read_tree
from flashgrpo.config.explain import explain
from flashgrpo.config.recipe import find_recipe, merge_choices, parse_override
from flashgrpo.config.settings import CheckpointConfig, EvaluationConfig, PromptsConfig, TrackingConfig
from flashgrpo.distributed.settings import ParallelConfig
from flashgrpo.errors import UserError, first_line
from flashgrpo.learning.settings import OptimConfig
from flashgrpo.models.settings import Lora, ModelConfig
from flashgrpo.presets import PRESETS, Algorithm
from flashgrpo.processes.flow.settings import RolloutConfig, check_steps
from flashgrpo.scoring.settings import RewardConfig, check_rewards
from flashgrpo.settings import Part


def without_null(value: Any) -> Any:
    """Return a mapping without the entries that are null."""
    return {key: entry for key, entry in value.items() if entry is not None} if isinstance(value, Mapping) else value


class RunConfig(Part):
    """All settings of a run."""

    out: str
    """The run directory."""
    seed: int = Field(default=0, ge=0)
    updates: int = Field(ge=1)
    model: ModelConfig
    algorithm: Annotated[Algorithm, BeforeValidator(algorithm_from, json_schema_input_type=Written)] = PRESETS[
        "flash-grpo"
    ]
    rollout: RolloutConfig = RolloutConfig()
    optim: OptimConfig = OptimConfig()
    prompts: PromptsConfig
    rewards: Annotated[dict[str, RewardConfig], BeforeValidator(without_null)] = Field(min_length=1)
    """Name -> reward; `rewards.NAME=null` takes one out of a recipe."""
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> "RunConfig":
        """Each part says what it cannot go with; here they only meet."""
        check_rewards(self.rewards)
        self.optim.check(self.rollout.prompts * self.rollout.group_size, self.updates)
        self.model.check(self.sharded)
        frozen, held_between = isinstance(self.model.train, Lora), self.sharded or self.parallel.context > 1
        check_steps(self.algorithm.explore, self.rollout.num_steps)
        self.rollout.check_shortcuts(held_between, frozen, self.model.offload, self.model.compile)
        self.rollout.check_retain(held_between, self.model.offload, self.optim.passes * self.optim.minibatches)
        return self

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the network in training, between processes or in another type than it computes in."""
        return self.parallel.shard > 1 or self.model.compute_dtype is not None

    def with_absolute_paths(self) -> "RunConfig":
        """Return the same run, whatever folder it is started from."""

        def absolute(path: str) -> str:
            kind, colon, name = path.rpartition("datasets:")  # the name of a data set may be a folder
            there = Path(name).expanduser()
            return f"{kind}{colon}{there.absolute()}" if there.exists() else path

        def absolute_call(call: str) -> str:
            file, colon, function = call.rpartition(":")
            return f"{absolute(file)}{colon}{function}" if file.endswith(".py") else call

        rewards = {name: r.model_copy(update={"call": absolute_call(r.call)}) for name, r in self.rewards.items()}
        prompts = PromptsConfig(train=absolute(self.prompts.train), heldout=absolute(self.prompts.heldout))
        cache = self.model.condition_cache
        folders = {"path": absolute(self.model.path), "condition_cache": cache and str(Path(cache).absolute())}
        model = self.model.model_copy(update=folders)
        changes = {"out": str(Path(self.out).absolute()), "model": model, "prompts": prompts, "rewards": rewards}
        return self.model_copy(update=changes)

    @classmethod
    def load(cls, recipe: str | Path, overrides: Sequence[str] = ()) -> "RunConfig":
        """Read a recipe (a file, or the name of one that ships with the package) and apply `key=value` overrides.

        Raises:
            UserError: the file is missing or no YAML mapping, or a setting is unknown or out of range.
        """
        path = find_recipe(str(recipe))
        try:
            tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{path} is no readable YAML file: {first_line(error)}") from error
        if not isinstance(tree, dict):
            raise UserError(f"{path} must hold a mapping of settings, not a list")
        tree = read_tree(tree, str(path))
        for override in overrides:
            tree = merge_choices(tree, read_tree(parse_override(override), f"override {override!r}"))
        return cls.parse(tree, str(path))

    @classmethod
    def parse(cls, tree: Any, source: str) -> "RunConfig":
        """Validate settings; the first problem becomes a `UserError` that names `source`, the key and the fix."""
        try:
            return cls.model_validate(read_tree(tree, source) if isinstance(tree, dict) else tree)
        except ValidationError as error:
            raise UserError(f"{source}: {explain(error, cls.model_json_schema())}") from error

    def to_yaml(self) -> str:
        """Return the resolved settings; loading the text again gives an equal RunConfig."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
