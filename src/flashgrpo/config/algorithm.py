"""What a recipe says of its algorithm: a preset's name, changes to one, and short names for the flow process."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler

from flashgrpo.config.recipe import merge_choices, without_gone
from flashgrpo.errors import UserError, suggest
from flashgrpo.learning.objective import AnyObjective, ClipRange
from flashgrpo.learning.settings import AnyBehaviour, Credit, Std
from flashgrpo.presets import PRESETS, AnyExplore, AnyScore
from flashgrpo.processes.flow.choices import Noise, Ratio, Steps, Weighting
from flashgrpo.settings import Part

SHORT: Mapping[str, tuple[str, str]] = {
    "steps": ("explore", "steps"),
    "noise": ("explore", "noise"),
    "weighting": ("score", "weighting"),
    "ratio": ("score", "ratio"),
    "adv_clip": ("credit", "clip"),
    "clip_range": ("objective", "clip_range"),
    "kl_coef": ("objective", "kl_coef"),
}
"""Key of a recipe's `algorithm` -> the part and the setting that it stands for."""
GROUPING: Mapping[str, tuple[str, str]] = {
    "std": ("credit", "std"),
    "combine": ("credit", "combine"),
    "shared_noise": ("explore", "shared_noise"),
}
"""The same of keys below `grouping`."""


class ShortGrouping(Part):
    """How the samples of a prompt group are compared, by its short names."""

    std: Std = "group"
    """Short for credit.std."""
    combine: Literal["normalized", "raw"] = "normalized"
    """Short for credit.combine."""
    shared_noise: bool = False
    """Short for explore.shared_noise."""


class AlgorithmRecipe(Part):
    """Changes to a preset.

    `steps`, `noise`, `weighting`, `ratio`, `grouping`, `clip_range`, `kl_coef` and `adv_clip` are short for what they
    set below `explore`, `score`, `credit` and `objective`. Of a mapping that has a `kind` only what differs from the
    preset's has to be said.
    """

    preset: str = Field(default="flash-grpo", json_schema_extra={"enum": list(PRESETS)})
    """The algorithm that the other settings change."""
    explore: AnyExplore
    """How the samples of a group come to differ."""
    score: AnyScore
    """What is replayed and judged."""
    credit: Credit
    """How rewards become advantages."""
    objective: AnyObjective
    """What is minimised."""
    behaviour: AnyBehaviour
    """Whose weights draw."""
    steps: Steps
    """Short for explore.steps."""
    noise: Noise
    """Short for explore.noise."""
    weighting: Weighting
    """Short for score.weighting."""
    ratio: Ratio
    """Short for score.ratio."""
    grouping: ShortGrouping
    """Short for how the samples of a group are compared."""
    clip_range: ClipRange
    """Short for objective.clip_range."""
    kl_coef: float
    """Short for objective.kl_coef."""
    adv_clip: float
    """Short for credit.clip."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Require nothing, not even a `kind`: what a recipe leaves out comes from the preset."""
        schema = handler(core)
        _require_nothing(handler.resolve_ref_schema(schema), handler)
        return schema


def _require_nothing(node: Any, handler: GetJsonSchemaHandler) -> None:
    """Let mappings leave out any key, here and below; {eta: 0.5} is a choice of whichever kinds have an eta."""
    if isinstance(node, list):
        for one in node:
            _require_nothing(one, handler)
    elif isinstance(node, dict):
        node.pop("required", None)
        if "discriminator" in node and "oneOf" in node:
            node["anyOf"] = node.pop("oneOf")
        if "$ref" in node:
            _require_nothing(handler.resolve_ref_schema(node), handler)
        for one in node.values():
            _require_nothing(one, handler)


Written = Annotated[str, Field(json_schema_extra={"enum": list(PRESETS)})] | AlgorithmRecipe
"""What a recipe may hold under `algorithm`, for its JSON schema."""


def algorithm_from(value: Any) -> Any:
    """Resolve a preset's name, or a mapping of changes to one: to its `preset`, or to flash-grpo where it names none.

    Raises:
        ValueError: there is no such preset, or a setting is given twice, by its short name and by its long one.
    """
    if not isinstance(value, str | Mapping):
        return value
    changes = {"preset": value} if isinstance(value, str) else spelled_out(value)
    name = changes.pop("preset", "flash-grpo")
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"no preset is called {name!r:.80}; {suggest(str(name), PRESETS)}")
    return merge_choices(asdict(PRESETS[name]), changes)


def spelled_out(changes: Mapping[Any, Any]) -> dict[Any, Any]:
    """Replace short names by what they stand for: {"kl_coef": 1} is {"objective": {"kl_coef": 1}}.

    Raises:
        ValueError: a setting is given twice, or a key below `grouping` is unknown.
    """
    long = {key: value for key, value in changes.items() if key not in SHORT and key != "grouping"}
    short = [(key, SHORT[key], value) for key, value in changes.items() if key in SHORT]
    grouping = changes.get("grouping", {})
    if not isinstance(grouping, Mapping):
        raise ValueError(f"algorithm.grouping is a mapping of {', '.join(GROUPING)}, not {grouping!r:.80}")
    for key, value in grouping.items():
        if key not in GROUPING:
            raise ValueError(f"unknown key algorithm.grouping.{key}; {suggest(str(key), GROUPING)}")
        short.append((f"grouping.{key}", GROUPING[key], value))
    for name, (part, key), value in short:
        into = long.setdefault(part, {})
        if not isinstance(into, Mapping) or key in into:
            raise ValueError(f"algorithm.{name} and algorithm.{part}.{key} are one setting: give it once")
        long[part] = {**into, key: value}
    return long


def read_tree(tree: Mapping[Any, Any], source: str) -> dict[Any, Any]:
    """Read a recipe, or a part of one, with every setting by its long name and without those that are gone.

    Raises:
        UserError: a setting is given twice, or is gone and has a value of its own; it names `source` and the key.
    """
    algorithm = tree.get("algorithm")
    try:
        long = {**tree, "algorithm": spelled_out(algorithm)} if isinstance(algorithm, Mapping) else dict(tree)
        return without_gone(long, short_name)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def short_name(key: str) -> str:
    """Return the short name of a setting where it has one: `algorithm.explore.noise.eta` is `algorithm.noise.eta`."""
    head, *parts = key.split(".")
    if head != "algorithm" or len(parts) < 2:
        return key
    for table, prefix in ((SHORT, []), (GROUPING, ["grouping"])):
        for short, long in table.items():
            if tuple(parts[:2]) == long:
                return ".".join([head, *prefix, short, *parts[2:]])
    return key
