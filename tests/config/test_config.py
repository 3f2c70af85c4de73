"""Settings: presets and overrides merge as a user means them, and bad ones get a sentence."""

import json

import pytest
import yaml

from flashgrpo import presets
from flashgrpo.config import PRESETS, RunConfig
from flashgrpo.errors import UserError
from flashgrpo.processes.flow.noise import FlowSde
from flashgrpo.processes.flow.steps import AllSteps
from tests.conftest import by_its_process


def test_resolved_settings_start_the_same_run_again(make_run, tmp_path):
    for name in PRESETS:
        config = make_run(*by_its_process(name, "rollout.num_steps=20"))
        file = tmp_path / "again.yaml"
        file.write_text(config.to_yaml(), "utf-8")
        assert RunConfig.load(file) == config


@pytest.mark.parametrize(("name", "value"), PRESETS.items())
def test_a_preset_by_name_is_that_value(make_run, name, value):
    assert make_run(*by_its_process(name, "rollout.num_steps=20")).algorithm == value


def test_published_presets():
    flash = presets.FLASH_GRPO
    steps, noise = flash.explore.steps, flash.explore.noise
    assert (steps.per, steps.window, noise.kind, noise.eta) == ("group", (0.0, 0.5), "linear", 1)
    assert (flash.credit.std, flash.explore.shared_noise, flash.score.weighting.kind) == ("batch", False, "rectified")
    assert (flash.objective.clip_range, flash.credit.clip, flash.objective.kl_coef) == (1e-3, 5.0, 0.0)
    assert presets.FLOW_GRPO_FAST.explore.shared_noise
    assert presets.FLOW_GRPO_FAST.score.weighting.kind == "uniform"
    assert presets.DANCE_GRPO.explore.noise.eta == 0.3


def test_a_preset_with_changes(make_run):
    config = make_run("algorithm.kl_coef=0.01", "algorithm.noise.kind=flow")
    assert config.algorithm.objective.kl_coef == 0.01
    assert config.algorithm.explore.steps.draw == "stratified"  # the recipe's own change stays
    assert config.algorithm.explore.noise == FlowSde()  # another kind starts from its own defaults
    assert config.algorithm.score == presets.FLASH_GRPO.score
    changed = make_run("algorithm={preset: flow-grpo, steps: {fraction: 0.5}}")
    assert changed.algorithm.explore.steps == AllSteps(fraction=0.5)
    assert (
        changed.algorithm.explore.noise == presets.FLOW_GRPO.explore.noise
    )  # another preset drops the recipe's changes


def test_overrides_read_numbers_as_yaml(make_run):
    config = make_run("optim.lr=1e-4", "optim.betas=[0.8,0.9]", "model.shift=2", "evaluation.patience=null")
    assert (config.optim.lr, config.optim.betas, config.model.shift) == (1e-4, (0.8, 0.9), 2.0)
    assert config.evaluation.patience is None


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["updatse=3"], "unknown key updatse; did you mean 'updates'?"),
        (["optim.learning=3"], "unknown key optim.learning; "),
        (["model.train.rnk=4"], "unknown key model.train.rnk; did you mean 'rank'?"),
        (["algorithm.noise.etaa=1"], "unknown key algorithm.noise.etaa; did you mean 'eta'?"),
        (["algorithm.clip_rang=1"], "unknown key algorithm.clip_rang; did you mean 'clip_range'?"),
        (["rewards.agreement.wieght=2"], "unknown key rewards.agreement.wieght; did you mean 'weight'?"),
        (["updates=many"], "updates must be a whole number, not 'many'"),
        (["updates=0"], "updates must be at least 1, not 0"),
        (["optim.lr=-1"], "optim.lr must be at least 1e-15, not -1"),
        (["optim.lr=.nan"], "optim.lr must be a finite number, not nan"),
        (["rollout.group_size=1"], "rollout.group_size must be at least 2, not 1"),
        (["algorithm=flash"], "algorithm: no preset is called 'flash'; did you mean 'flash-grpo'?"),
        (["algorithm.steps.window=[0.5,1.5]"], "algorithm.steps: window of OneStep is a pair of fractions"),
        (["algorithm.steps.window=[0.5,0.2]"], "algorithm.steps: window of OneStep is a pair of fractions"),
        (["algorithm.steps.window=[0.9,1.0]"], "algorithm.steps with rollout.num_steps 4: the window (0.9, 1.0)"),
        (["algorithm.steps={kind: window, stop: 99}"], "stop of Window is 99, but there are only 4 steps"),
        (["algorithm.noise.eta=0"], "algorithm.noise: eta of the noise 'cps' must be from 1e-15 to 1, not 0"),
        (
            ["algorithm.noise.kind=lineal"],
            "algorithm.noise is of the kind 'linear', 'flow', 'constant', 'cps', not 'lineal'",
        ),
        (["optim.betas=[2,0.9]"], "entry 1 of optim.betas must be below 1, not 2"),
        (["algorithm.clip_range=.inf"], "algorithm.objective: clip_range must be from 1e-15 to 1,000,000,000, not inf"),
        (["algorithm.kl_coef=.inf"], "algorithm.objective: kl_coef must be from 0 to 1,000,000,000, not inf"),
        (
            ["optim.lr=10", "optim.weight_decay=0.2"],
            "optim.weight_decay: times optim.lr it is 2, the share of each weight",
        ),
        (["optim.minibatches=5"], "optim.minibatches: 4 samples cannot be cut into 5 parts"),
        (["optim.ema.every=5"], "the run has 4 optimizer steps, so an average that moves every 5 would stay"),
        (["model.dtype=bfloat16", "model.train={kind: full}"], "full training keeps float32 weights"),
        (["model.offload=true", "model.train={kind: full}"], "model.offload: full training has nothing that could"),
        (["model.offload=true", "model.compute_dtype=bfloat16"], "model.offload: a network that FSDP2 holds stays"),
        (["rollout.solver.kind=unipcc"], "rollout.solver is of the kind 'euler', 'unipc', 'dpm', not 'unipcc'"),
        (["rewards.persistence.weight=3"], "rewards.persistence: weight has no effect on a watched reward"),
        (["algorithm.clip_range=0"], "algorithm.objective: clip_range must be from 1e-15 to"),
        (["rewards.agreement.weight=0"], "rewards.agreement: weight must not be 0"),
        (["rewards.agreement.watched=true"], "every reward is watched only"),
        (["seed"], "override 'seed' must have the form key=value"),
        (["optim..lr=1"], "override 'optim..lr=1' must have the form key=value"),
        (["optim=3"], "optim must hold settings, key: value, not 3"),
        (["optim.lr=[1"], "override 'optim.lr=[1' cannot be read: line 1: expected ',' or ']'"),
        (["optim.betas=[0.9,0.8,0.7]"], "optim.betas takes 2 at most, not 3"),
        (["optim.betas=[0.9]"], "entry 2 of optim.betas is missing"),
        (["tracking.trackers=wandb"], "tracking.trackers must be a list such as [a, b], not 'wandb'"),
        (["tracking.progress=maybe"], "tracking.progress must be true or false, not 'maybe'"),
        (["rewards={1: {call: x}}"], "a name in rewards must be text, not 1; put it in quotes"),
        (["rewards={agreement: null, persistence: null, background: null}"], "rewards needs 1 or more, not 0"),
        (["model.train={rank: 4}", "model.train.kind=5"], "model.train is of the kind 'lora', 'full', not '5'"),
        (["model={negative_prompt: no}"], "model.negative_prompt must be text, not false; put it in quotes"),
        (["model.path="], "model.path must not be empty"),
        (["updates=1000000000000"], "updates must be at most 1,000,000, not 1000000000000"),
        (["rollout.prompts=100000", "rollout.group_size=100000"], "an update has 1,000,000 samples at most"),
        (["seed=" + "[" * 3000], "it nests more than 32 levels deep"),
        (["seed=&a [*a]"], "it nests more than 32 levels deep"),
        (["seed={a: 1, a: 2}"], "'a' is given twice"),
        (["model.negative_prompt=\udcff"], "is no text that UTF-8 can hold"),
        (["out=a\0b"], "out: 'a\\x00b' is no path, for it holds the character NUL"),
        (["out=~nobody-here/runs"], "out: no home is known for ~nobody-here; write ./~nobody-here/runs if that is"),
    ],
)
def test_a_bad_setting_gets_a_sentence(make_run, overrides, sentence):
    with pytest.raises(UserError) as error:
        make_run(*overrides)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert "tiny.yaml" in str(error.value) or "override" in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"out: [", "is no readable YAML file"),
        (b"- 1\n", "must hold a mapping"),
        (b"out: \xff\n", "is no readable YAML file"),
        (b"out: a\nout: b\n", "is no readable YAML file"),
        (b"", "is missing"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, sentence):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text)
    with pytest.raises(UserError, match=sentence):
        RunConfig.load(file)


def test_a_missing_recipe_names_those_that_ship():
    with pytest.raises(UserError, match=r"no recipe nowhere\.yaml; give a YAML file or one of: .*tiny"):
        RunConfig.load("nowhere.yaml")


def test_schema_describes_every_setting():
    schema = RunConfig.model_json_schema()
    json.dumps(schema)
    assert "run directory" in schema["properties"]["out"]["description"]
    assert yaml.safe_load(RunConfig.load("tiny").to_yaml()).keys() == schema["properties"].keys()


def test_shortcuts_stand_for_settings_of_a_rollout_and_give_way_to_what_is_said_beside_them(tmp_path):
    recipe = ["out=unused", "rollout.shortcuts=fast"]
    rollout = RunConfig.load("wan21-1.3b", recipe).rollout
    assert (rollout.deterministic_steps, rollout.solver.kind, rollout.guidance_interval) == (5, "unipc", (0.0, 1.0))
    config = RunConfig.load("wan21-1.3b", [*recipe, "rollout.deterministic_steps=null"])
    assert (config.rollout.deterministic_steps, config.rollout.solver.kind) == (None, "unipc")
    (written := tmp_path / "written.yaml").write_text(config.to_yaml(), "utf-8")
    assert RunConfig.load(written) == config
    with pytest.raises(UserError, match=r"rollout\.shortcuts must be 'fast', not 'quick'"):
        RunConfig.load("wan21-1.3b", ["out=unused", "rollout.shortcuts=quick"])
