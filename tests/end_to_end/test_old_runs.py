"""A run directory that the version before this structure has made loads, resumes, evaluates, reports and exports.

`tests/data/run-0.1` was trained by commit 178a4b5 with `algorithm.weighting={kind: rectified, over: window}`.
"""

import json
import shutil
from pathlib import Path

import pytest

from flashgrpo import RunConfig, evaluate, train
from flashgrpo.errors import UserError
from flashgrpo.export import export
from flashgrpo.presets import FLASH_GRPO
from flashgrpo.report import write_report
from flashgrpo.run.directory import read_lines


@pytest.fixture
def old(tmp_path) -> Path:
    return Path(shutil.copytree(Path(__file__).parents[1] / "data/run-0.1", tmp_path / "run"))


def test_its_settings_mean_what_they_meant(old):
    config = RunConfig.load(old / "config.yaml")
    assert config.algorithm.credit == FLASH_GRPO.credit
    assert config.algorithm.score == FLASH_GRPO.score
    assert config.algorithm.objective == FLASH_GRPO.objective
    assert (config.algorithm.explore.steps.draw, config.algorithm.explore.noise.kind) == ("stratified", "cps")
    assert config.optim.grad_norm_by_step is True
    again = old.parent / "again.yaml"
    again.write_text(config.to_yaml(), "utf-8")
    assert RunConfig.load(again) == config


@pytest.mark.parametrize(
    ("setting", "value"), [("over: window", "over: update"), ("context_kind: ulysses", "context_kind: ring")]
)
def test_a_setting_that_is_gone_is_refused_with_another_value(old, setting, value):
    file = old / "config.yaml"
    file.write_text(file.read_text("utf-8").replace(setting, value), "utf-8")
    with pytest.raises(UserError, match=value.split(": ")[0]):
        RunConfig.load(file)


def test_it_evaluates_as_it_did(old):
    recorded = read_lines(old / "evaluations.jsonl")[-1]
    found = evaluate(old)
    assert found["update"] == recorded["update"] == 2
    assert found["reward"] == pytest.approx(recorded["reward"], abs=2e-3)  # of another CPU, perhaps
    assert found["difference"] == pytest.approx(recorded["difference"], abs=2e-3)
    assert [sample["prompt"] for sample in found["samples"]] == [sample["prompt"] for sample in recorded["samples"]]


def test_it_resumes_reports_and_exports(old):
    lines = read_lines(old / "metrics.jsonl")
    config = RunConfig.load(old / "config.yaml", ["updates=3", f"out={old}"])
    train(config)
    longer = read_lines(old / "metrics.jsonl")
    assert longer[:2] == lines
    assert [line["update"] for line in longer] == [1, 2, 3]
    assert longer[2].keys() == lines[1].keys()
    assert longer[2]["drift"] == 0
    assert "algorithm" in json.loads(json.dumps(RunConfig.load(old / "config.yaml").model_dump(mode="json")))
    assert write_report(old).stat().st_size > 10_000
    assert (export(old, "diffusers") / "pytorch_lora_weights.safetensors").is_file()
