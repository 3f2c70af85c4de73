"""A run is one YAML file: RunConfig, and the sentences that bad input gets.

OmegaConf reads files and `key=value` overrides, pydantic validates the result. Every key is used; an unknown one
is refused with the nearest known name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from flashgrpo.config.explain import explain
from flashgrpo.config.recipe import find_recipe, merge_choices, parse_override
from flashgrpo.config.settings import EvaluationConfig, PromptsConfig
from flashgrpo.distributed.settings import ParallelConfig
from flashgrpo.errors import UserError, first_line, suggest
from flashgrpo.learning.settings import OptimConfig
from flashgrpo.models.settings import Full, ModelConfig
from flashgrpo.presets import PRESETS, Algorithm
from flashgrpo.processes.flow.settings import RolloutConfig
from flashgrpo.run.settings import CheckpointConfig, TrackingConfig
from flashgrpo.scoring.settings import RewardConfig
from flashgrpo.settings import Part


def algorithm_from(value: Any) -> Any:
    """A preset's name, or a mapping of changes to one: to its `preset`, or to flash-grpo where it names none."""
    if not isinstance(value, str | Mapping):
        return value
    changes = {"preset": value} if isinstance(value, str) else dict(value)
    name = changes.pop("preset", "flash-grpo")
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}; {suggest(str(name), PRESETS)}")
    return merge_choices(asdict(PRESETS[name]), changes)


def without_null(value: Any) -> Any:
    """A mapping without the entries that are null."""
    return {key: entry for key, entry in value.items() if entry is not None} if isinstance(value, Mapping) else value


class RunConfig(Part):
    """A run, whole."""

    out: str
    """The run directory."""
    seed: int = Field(default=0, ge=0)
    updates: int = Field(ge=1)
    model: ModelConfig
    algorithm: Annotated[Algorithm, BeforeValidator(algorithm_from)] = PRESETS["flash-grpo"]
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
    def _choices_fit(self) -> "RunConfig":
        if all(reward.watched for reward in self.rewards.values()):
            raise ValueError("rewards: every reward is watched only, so there is nothing to train on")
        try:
            self.algorithm.steps.candidates(self.rollout.num_steps)
        except ValueError as error:
            raise ValueError(f"algorithm.steps with rollout.num_steps {self.rollout.num_steps}: {error}") from error
        samples = self.rollout.prompts * self.rollout.group_size
        if self.optim.minibatches > samples:
            raise ValueError(f"optim.minibatches: {samples} samples cannot be cut into {self.optim.minibatches} parts")
        steps = self.updates * self.optim.minibatches * self.optim.passes
        if self.optim.ema.every > steps:
            raise ValueError(
                f"optim.ema.every: the run has {steps} optimizer steps, so an average that moves every "
                f"{self.optim.ema.every} would stay the base model, which is what evaluation would see; lower it"
            )
        if self.model.offload and self.sharded:
            raise ValueError("model.offload: a network that FSDP2 holds stays where it is; choose one of the two")
        if self.model.offload and isinstance(self.model.train, Full):
            raise ValueError("model.offload: full training has nothing that could be off the device; leave it out")
        if self.optim.eight_bit and self.sharded:
            raise ValueError("optim.eight_bit: moments that FSDP2 shards stay in 32 bits; choose one of the two")
        if self.model.dtype != "float32" and isinstance(self.model.train, Full):
            raise ValueError(f"model.dtype: full training keeps float32 weights, so {self.model.dtype} has no effect")
        return self

    @model_validator(mode="after")
    def _shortcuts_fit(self) -> "RunConfig":
        settings, held_between = self.rollout, self.parallel.context > 1 or self.sharded
        if settings.deterministic_dtype == "float8" and (held_between or self.model.offload):
            raise ValueError(
                "rollout.deterministic_dtype: float8 needs the network whole and on the device; take bfloat16, or "
                "leave out parallel.shard, parallel.context, model.compute_dtype and model.offload"
            )
        if settings.deterministic_dtype == "float8" and isinstance(self.model.train, Full):
            raise ValueError("rollout.deterministic_dtype: float8 is of frozen weights, full training has none")
        if settings.reuse and held_between:
            raise ValueError(
                "rollout.reuse: processes that hold a network between them compute every step; leave it out"
            )
        if settings.reuse and self.model.compile:
            raise ValueError("rollout.reuse: compiled blocks compute every step; choose one of the two")
        if settings.retain and self.replays:
            raise ValueError(f"rollout.retain: {self.replays}; leave it out")
        return self

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the network in training, between processes or in another type than it computes in."""
        return self.parallel.shard > 1 or self.model.compute_dtype is not None

    @property
    def replays(self) -> str | None:
        """Why an update has to replay the trained steps rather than keep their graphs, if it has to."""
        if self.optim.passes * self.optim.minibatches > 1:
            return "a rollout that serves several optimizer steps is replayed for the later ones"
        if self.sharded or self.parallel.context > 1:
            return "processes that hold a network between them replay together"
        if self.model.offload:
            return "with model.offload the network leaves the device before the update"
        return None

    def with_absolute_paths(self) -> "RunConfig":
        """The same run, whatever folder it is started from."""

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
        for override in overrides:
            tree = merge_choices(tree, parse_override(override))
        return cls.parse(tree, str(path))

    @classmethod
    def parse(cls, tree: Any, source: str) -> "RunConfig":
        """Validate settings; the first problem becomes a `UserError` that names `source`, the key and the mend."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise UserError(f"{source}: {explain(error, cls.model_json_schema())}") from error

    def to_yaml(self) -> str:
        """The resolved settings; loading the text again gives an equal RunConfig."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
