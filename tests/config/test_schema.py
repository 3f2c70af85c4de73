"""The JSON schema of a recipe, for editors: it accepts what is accepted and refuses what is refused."""

from pathlib import Path

import pytest
import yaml

from flashgrpo.config import RunConfig, recipe_schema
from flashgrpo.config.reading import read_recipe
from flashgrpo.errors import UserError
from flashgrpo.presets import PRESETS
from tests.conftest import by_its_process

jsonschema = pytest.importorskip("jsonschema")  # comes with ray

RECIPES = sorted((Path(__file__).parent.parent.parent / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def problems():
    """Where a tree of settings does not fit the schema."""
    schema = RunConfig.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    return lambda tree: [error.message for error in validator.iter_errors(tree)]


def recipe_with(algorithm: object) -> dict:
    """The bundled recipe with another algorithm, as a mapping."""
    return {**read_recipe(next(file for file in RECIPES if file.stem == "tiny")), "algorithm": algorithm}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_schema_accepts_every_shipped_recipe_as_it_is_written(problems, file):
    assert problems(read_recipe(file)) == []
    assert file.read_text("utf-8").startswith("# yaml-language-server: $schema=recipe.schema.json\n")


def test_every_setting_is_described():
    """At every level, those of the choices too."""
    schema = recipe_schema()
    parts = {"a run": schema, **schema["$defs"]}
    settings = [(part, name, node) for part, tree in parts.items() for name, node in tree.get("properties", {}).items()]
    assert len(settings) > 150
    assert not [(part, name) for part, name, node in settings if len(node.get("description", "")) < 3]


@pytest.mark.parametrize("name", PRESETS)
def test_the_schema_accepts_a_bare_preset_and_resolved_settings(problems, make_run, name):
    assert problems(recipe_with(name)) == []
    resolved = make_run(*by_its_process(name, "rollout.num_steps=20")).model_dump(mode="json")
    assert problems(resolved) == []


@pytest.mark.parametrize(
    "algorithm",
    [
        "{}",
        "{preset: flow-grpo}",
        "{noise: {kind: cps}}",
        "{noise: {eta: 0.5}}",
        "{steps: {draw: stratified}}",
        "{steps: {kind: window, size: 2}, grouping: {std: group}, weighting: {kind: noise-level}}",
        "{clip_range: [0.1, 0.2], kl_coef: 1, adv_clip: 3, ratio: {kind: normalized}}",
        "{explore: {steps: {draw: stratified}}}",
        "{explore: {noise: {kind: cps}, shared_noise: true}, score: {ratio: {kind: plain}}}",
        "{explore: {kind: stochastic}, credit: {baseline: mean, clip: 2}, objective: {kind: clipped, kl_coef: 0.1}}",
        "{preset: mix-grpo, behaviour: {kind: current}, objective: {}}",
    ],
)
def test_the_schema_accepts_what_is_accepted_in_either_spelling(problems, tmp_path, algorithm):
    tree = recipe_with(yaml.safe_load(algorithm))
    assert problems(tree) == []
    (file := tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    RunConfig.load(file)


@pytest.mark.parametrize(
    "algorithm",
    [
        "flash",
        "{preset: flash}",
        "{nois: {kind: cps}}",
        "{noise: {kind: cpss}}",
        "{noise: {etaa: 0.5}}",
        "{steps: {kind: all, size: 3}}",
        "{steps: {kind: window, fraction: 0.5}}",
        "{grouping: {sdt: group}}",
        "{explore: {stpes: {kind: all}}}",
        "{explore: {noise: {kind: cps, eta: much}}}",
        "{credit: {std: bach}}",
        "{objective: {kl: 0.1}}",
        "{behaviour: {kind: frozn}}",
    ],
)
def test_the_schema_refuses_what_is_refused(problems, tmp_path, algorithm):
    tree = recipe_with(yaml.safe_load(algorithm))
    assert problems(tree)
    (file := tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError):
        RunConfig.load(file)


def test_the_schema_refuses_misspelt_keys_elsewhere(problems):
    tree = recipe_with("flash-grpo")
    assert problems({**tree, "updatse": 3})
    assert problems({**tree, "optim": {"learning": 1}})
    assert problems({**tree, "model": {**tree["model"], "train": {"kind": "lora", "rnk": 3}}})
    assert problems({key: value for key, value in tree.items() if key != "model"})
