"""docs/papers.md says what the presets are: every block is the preset, and every preset has a block."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from flashgrpo.config import RunConfig
from flashgrpo.config.algorithm import algorithm_from, short_name, spelled_out
from flashgrpo.presets import FLASH_GRPO, FLOW_GRPO, PRESETS, Algorithm
from flashgrpo.processes.flow.choices import Recorded
from flashgrpo.processes.flow.weighting import NoiseLevel, NormalizedRatio, PlainRatio, StepLength
from tests.conftest import by_its_process

PAGE = (Path(__file__).parent.parent / "docs" / "papers.md").read_text()
BLOCKS = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
ENTRIES = {block["preset"]: block for block in BLOCKS if "preset" in block}
EXAMPLES = [block["algorithm"] for block in BLOCKS if "algorithm" in block]
ALGORITHM = TypeAdapter(Algorithm)
CHOICES = {"steps", "noise", "grouping", "weighting"}
FORWARD = {"explore", "score", "credit", "objective"}


def test_every_preset_has_one_entry_and_every_block_is_one_of_the_two_sorts():
    assert list(ENTRIES) == list(PRESETS)
    assert len(BLOCKS) == len(ENTRIES) + len(EXAMPLES)


@pytest.mark.parametrize("name", PRESETS)
def test_an_entry_builds_its_preset_from_nothing(name):
    entry = {key: value for key, value in ENTRIES[name].items() if key != "preset"}
    assert entry.keys() >= (CHOICES if PRESETS[name].explore.kind == "stochastic" else FORWARD)
    assert ALGORITHM.validate_python(spelled_out(entry)) == PRESETS[name]


def differences(a: dict, b: dict, prefix: str = "") -> set[str]:
    """Keys, with dots, whose values differ, by the names that a recipe has for them.

    A choice of another kind is one difference.
    """
    found = set()
    for key in a.keys() | b.keys():
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict) and x.get("kind") == y.get("kind"):
            found |= differences(x, y, f"{prefix}{key}.")
        elif x != y:
            found.add(short_name(f"algorithm.{prefix}{key}").removeprefix("algorithm."))
    return found


@pytest.mark.parametrize(
    ("name", "parent", "changed"),
    [
        ("flow-grpo-fast-2", "flow-grpo-fast", {"steps.count"}),
        ("one-step", "flash-grpo", {"steps.per", "weighting"}),
        ("grouping-only", "flash-grpo", {"weighting"}),
        ("grouping-only", "flow-grpo-fast", {"grouping.shared_noise"}),
        ("rectification-only", "flash-grpo", {"steps.per"}),
        ("flash-grpo-whole-grid", "flash-grpo", {"steps.window"}),
        ("flash-grpo-stratified", "flash-grpo", {"steps.draw"}),
        ("flash-grpo-cps", "flash-grpo", {"noise"}),
        ("flash-grpo-shared-noise", "flash-grpo", {"grouping.shared_noise"}),
    ],
)
def test_an_ablation_changes_what_its_name_says(name, parent, changed):
    assert differences(asdict(PRESETS[name]), asdict(PRESETS[parent])) == changed


def test_presets_are_told_apart():
    assert len(set(PRESETS.values())) == len(PRESETS)


def test_the_options_are_read_as_the_page_writes_them():
    found = [ALGORITHM.validate_python(algorithm_from(example)) for example in EXAMPLES]
    scores = [Recorded(NoiseLevel(), PlainRatio()), Recorded(StepLength(), NormalizedRatio())]
    assert [a.score for a in found] == scores
    assert found[1] == replace(FLOW_GRPO, score=scores[1], objective=replace(FLOW_GRPO.objective, clip_range=4e-6))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_yaml(make_run, tmp_path, name):
    config = make_run(*by_its_process(name, "rollout.num_steps=8"))
    assert config.algorithm == PRESETS[name]
    (file := tmp_path / "again.yaml").write_text(config.to_yaml())
    assert RunConfig.load(file) == config


@pytest.mark.parametrize("preset", ["one-step", "flow-grpo-fast"])
def test_options_go_with_any_preset(make_run, tmp_path, preset):
    config = make_run(f"algorithm={{preset: {preset}, weighting: {{kind: noise-level}}, ratio: {{kind: normalized}}}}")
    assert config.algorithm == replace(PRESETS[preset], score=Recorded(NoiseLevel(), NormalizedRatio()))
    (file := tmp_path / "again.yaml").write_text(config.to_yaml())
    assert RunConfig.load(file) == config


def test_a_run_that_names_no_ratio_has_the_plain_one():
    """Settings of runs from before there was a choice."""
    whole = asdict(FLASH_GRPO)
    old = {**whole, "score": {key: value for key, value in whole["score"].items() if key != "ratio"}}
    assert ALGORITHM.validate_python(old) == FLASH_GRPO
    explore, credit = whole["explore"], whole["credit"]
    older = {"steps": explore["steps"], "noise": explore["noise"], "weighting": whole["score"]["weighting"]}
    older["grouping"] = {"std": credit["std"], "combine": credit["combine"], "shared_noise": explore["shared_noise"]}
    older |= {"clip_range": 1e-3, "adv_clip": 5.0, "kl_coef": 0.0}
    assert ALGORITHM.validate_python(spelled_out(older)) == FLASH_GRPO
