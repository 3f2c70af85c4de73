"""What a recipe may say of its algorithm: long keys and short ones, and settings that are gone."""

import re
from pathlib import Path

import pytest
import yaml

from flashgrpo.config import RunConfig
from flashgrpo.config.recipe import GONE
from flashgrpo.errors import UserError

SPELLINGS = [  # short, long
    ("steps={kind: all, fraction: 0.5}", "explore.steps={kind: all, fraction: 0.5}"),
    ("steps.draw=iid", "explore.steps.draw=iid"),
    ("noise={kind: flow, eta: 0.3}", "explore.noise={kind: flow, eta: 0.3}"),
    ("noise.eta=0.2", "explore.noise.eta=0.2"),
    ("grouping.shared_noise=true", "explore.shared_noise=true"),
    ("weighting.kind=noise-level", "score.weighting.kind=noise-level"),
    ("ratio.kind=normalized", "score.ratio.kind=normalized"),
    ("grouping.std=group", "credit.std=group"),
    ("grouping.combine=raw", "credit.combine=raw"),
    ("adv_clip=3", "credit.clip=3"),
    ("clip_range=[1e-4,2e-4]", "objective.clip_range=[1e-4,2e-4]"),
    ("kl_coef=0.1", "objective.kl_coef=0.1"),
]


@pytest.fixture
def stored(tmp_path):
    """A config.yaml as a run keeps it, which has long keys; with changes."""

    def write(*overrides: str) -> Path:
        file = tmp_path / "config.yaml"
        file.write_text(RunConfig.load("tiny", ["out=runs/x", *overrides]).to_yaml(), "utf-8")
        assert "explore" in yaml.safe_load(file.read_text())["algorithm"]
        assert "noise" not in yaml.safe_load(file.read_text())["algorithm"]
        return file

    return write


@pytest.mark.parametrize(("short", "long"), SPELLINGS)
def test_short_and_long_keys_mean_the_same(make_run, short, long):
    changed = make_run(f"algorithm.{short}")
    assert changed == make_run(f"algorithm.{long}")
    assert changed != make_run()


def test_a_whole_algorithm_in_either_spelling(make_run):
    short = """{preset: mix-grpo, steps: {size: 2}, noise: {kind: cps, eta: 0.5}, ratio: {kind: normalized},
        grouping: {std: batch, combine: raw}, weighting: {kind: step-length},
        clip_range: 0.2, kl_coef: 1, adv_clip: 2}"""
    long = """{preset: mix-grpo, explore: {steps: {size: 2}, noise: {kind: cps, eta: 0.5}},
        score: {weighting: {kind: step-length}, ratio: {kind: normalized}},
        credit: {baseline: mean, std: batch, combine: raw, clip: 2}, objective: {clip_range: 0.2, kl_coef: 1},
        behaviour: {kind: current}}"""
    assert make_run(f"algorithm={short}") == make_run(f"algorithm={long}")
    assert make_run(f"algorithm={long}").algorithm.explore.shared_noise, "what is not said comes from the preset"


def test_one_key_short_and_another_long(make_run):
    algorithm = make_run("algorithm={kl_coef: 0.1, objective: {clip_range: 0.01}}").algorithm
    assert (algorithm.objective.kl_coef, algorithm.objective.clip_range) == (0.1, 0.01)
    assert algorithm.explore == make_run().algorithm.explore


@pytest.mark.parametrize(("short", "long"), SPELLINGS)
def test_an_override_by_a_short_key_changes_stored_settings(stored, short, long):
    file = stored("evaluation.videos=0")
    changed = RunConfig.load(file, [f"algorithm.{short}"])
    assert changed == RunConfig.load(file, [f"algorithm.{long}"])
    assert changed == RunConfig.load("tiny", ["out=runs/x", "evaluation.videos=0", f"algorithm.{short}"])
    assert changed != RunConfig.load(file)


@pytest.mark.parametrize(
    ("algorithm", "names"),
    [
        ("{noise: {kind: cps}, explore: {noise: {kind: flow}}}", ("noise", "explore.noise")),
        ("{kl_coef: 0.1, objective: {kl_coef: 0.1}}", ("kl_coef", "objective.kl_coef")),
        ("{grouping: {std: group}, credit: {std: batch}}", ("grouping.std", "credit.std")),
        (
            "{grouping: {shared_noise: true}, explore: {shared_noise: true}}",
            ("grouping.shared_noise", "explore.shared_"),
        ),
        ("{adv_clip: 1, credit: {clip: 1}}", ("adv_clip", "credit.clip")),
    ],
)
def test_a_setting_given_twice_is_refused(stored, tmp_path, algorithm, names):
    tree = yaml.safe_load(stored().read_text()) | {"algorithm": yaml.safe_load(algorithm)}
    (file := tmp_path / "twice.yaml").write_text(yaml.safe_dump(tree))
    for load, source in (
        (lambda: RunConfig.load(file), str(file)),
        (lambda: RunConfig.load("tiny", [f"algorithm={algorithm}"]), f"override 'algorithm={algorithm}'"),
    ):
        with pytest.raises(UserError) as error:
            load()
        short, long = names
        assert f"{source}: algorithm.{short} and algorithm.{long}" in str(error.value)
        assert "are one setting: give it once" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("algorithm.objectiv.kl_coef=1", "unknown key algorithm.objectiv; did you mean 'objective'?"),
        ("algorithm.behavior={kind: current}", "unknown key algorithm.behavior; did you mean 'behaviour'?"),
        ("algorithm.klcoef=1", "unknown key algorithm.klcoef; did you mean 'kl_coef'?"),
        ("algorithm.wieghting={kind: uniform}", "unknown key algorithm.wieghting; did you mean 'weighting'?"),
        ("algorithm.explore.stpes={kind: all}", "unknown key algorithm.explore.stpes; did you mean 'steps'?"),
        ("algorithm.explore.noise.etaa=1", "unknown key algorithm.noise.etaa; did you mean 'eta'?"),
        ("algorithm.noise.etaa=1", "unknown key algorithm.noise.etaa; did you mean 'eta'?"),
        ("algorithm.credit.sdt=group", "unknown key algorithm.credit.sdt; did you mean 'std'?"),
        ("algorithm.grouping.sdt=group", "unknown key algorithm.grouping.sdt; did you mean 'std'?"),
        (
            "algorithm={preset: awm, noise: {eta: 0.5}}",
            "algorithm.noise is a setting of another kind of algorithm.explore; choose algorithm.explore.kind=stoch",
        ),
        (
            "algorithm={preset: flow-dppo, clip_range: 0.1}",
            "choose algorithm.objective.kind=clipped or competing for it",
        ),
        ("algorithm={preset: flow-dppo, score: {times: 2}}", "choose algorithm.score.kind=renoised"),
        ("algorithm.behaviour={kind: frozen, slope: 0.1}", "choose algorithm.behaviour.kind=averaged for it"),
        ("algorithm.grouping=group", "algorithm.grouping is a mapping of std, combine, shared_noise, not 'group'"),
        ("algorithm.grouping=null", "algorithm.grouping is a mapping of std, combine, shared_noise, not None"),
        (
            "algorithm.explore.kind=stochastics",
            "algorithm.explore is of the kind 'stochastic', 'deterministic', 'routing', ",
        ),
        (
            "algorithm.behaviour.kind=frozn",
            "algorithm.behaviour is of the kind 'current', 'averaged', 'frozen', not 'frozn'",
        ),
        (
            "algorithm.objective.kind=clippd",
            "algorithm.objective is of the kind 'clipped', 'kl-masked', 'drpo', 'contrast', 'competing', not '",
        ),
        (
            "algorithm.score.kind=renoisd",
            "algorithm.score is of the kind 'recorded', 'renoised', 'energy', 'transition', ",
        ),
    ],
)
def test_an_unknown_key_or_kind_is_refused_with_what_is_known(make_run, override, sentence):
    with pytest.raises(UserError) as error:
        make_run(override)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


GONE_SETTINGS = [  # key, the only value, another one
    ("algorithm.weighting.over", "window", "update"),
    ("algorithm.score.weighting.over", "window", "update"),
    ("parallel.context_kind", "ulysses", "ring"),
    ("optim.eight_bit", "false", "true"),
]


def test_every_setting_that_is_gone_is_tried():
    assert GONE.keys() <= {key for key, _, _ in GONE_SETTINGS}


@pytest.mark.parametrize(("key", "only", "other"), GONE_SETTINGS)
def test_a_setting_that_is_gone_is_accepted_with_the_only_value_that_is_left(make_run, stored, key, only, other):
    assert make_run(f"{key}={only}") == make_run()
    with pytest.raises(UserError) as error:
        make_run(f"{key}={other}")
    name = key.replace("algorithm.score.", "algorithm.")
    assert str(error.value).startswith(f"override '{key}={other}': {name}: ")
    assert re.search(r"is gone, since .*; leave the setting out$", str(error.value))
    file = stored()
    tree = yaml.safe_load(file.read_text())
    *above, last = key.split(".")
    node = tree
    for part in above:
        node = node.setdefault(part, {})
    node[last] = yaml.safe_load(only)
    if "weighting" in above and "score" not in above:
        del tree["algorithm"]["score"]
    file.write_text(yaml.safe_dump(tree))
    assert RunConfig.load(file) == RunConfig.load(stored())
    node[last] = yaml.safe_load(other)
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=re.escape(f"{file}: {name}: {node[last]!r} is gone, since ")):
        RunConfig.load(file)
