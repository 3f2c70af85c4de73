"""A run directory that the version before this structure has made loads, resumes, evaluates, reports and exports.

`tests/data/run-0.1` was trained by commit 178a4b5 with `algorithm.weighting={kind: rectified, over: window}`: it has
short keys and settings that are gone.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flashgrpo.config import RunConfig
from flashgrpo.errors import UserError
from flashgrpo.evaluate import evaluate
from flashgrpo.export import export
from flashgrpo.models.load import fast_dtype
from flashgrpo.presets import PRESETS
from flashgrpo.processes.flow.noise import Cps
from flashgrpo.processes.flow.steps import OneStep
from flashgrpo.report import write_report
from flashgrpo.run import checkpoint
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.lines import read_lines
from flashgrpo.train import train
from tools import curve

DATA = Path(__file__).parent.parent / "data"
FLOAT32 = fast_dtype(torch.device("cpu")) == "float32"  # else the autoencoder of the run decodes in bfloat16 here
TOLERANCE = 1e-4 if FLOAT32 else 2e-3
MEANS = ("update", "reward", "base_reward", "difference")


@pytest.fixture
def run(tmp_path) -> Path:
    return Path(shutil.copytree(DATA / "run-0.1", tmp_path / "run"))


def test_its_settings_mean_what_they_meant(run):
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["algorithm"]["weighting"]["over"] == "window"
    assert (written["parallel"]["context_kind"], written["optim"]["eight_bit"]) == ("ulysses", False)
    _, config = RunDirectory.existing(run)
    algorithm = config.algorithm
    assert algorithm.explore.steps == OneStep(per="group", window=(0.0, 0.5), draw="stratified")
    assert (algorithm.explore.noise, algorithm.explore.shared_noise) == (Cps(eta=0.7), False)
    assert (algorithm.score, algorithm.credit) == (PRESETS["flash-grpo"].score, PRESETS["flash-grpo"].credit)
    assert (algorithm.objective.clip_range, algorithm.objective.kl_coef) == (1e-3, 0.0)
    assert (config.optim.lr, config.rollout.deterministic_steps, config.model.train.rank) == (3e-3, 4, 2)
    assert config.optim.grad_norm_by_step is True
    (again := run.parent / "again.yaml").write_text(config.to_yaml(), "utf-8")
    assert RunConfig.load(again) == config


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("over: window", "over: update"),
        ("context_kind: ulysses", "context_kind: ring"),
        ("eight_bit: false", "eight_bit: true"),
    ],
)
def test_a_setting_that_is_gone_is_refused_with_another_value(run, setting, value):
    file = run / "config.yaml"
    file.write_text(file.read_text("utf-8").replace(setting, value), "utf-8")
    with pytest.raises(UserError, match=value.split(": ")[0]):
        RunConfig.load(file)


def test_evaluate_repeats_what_it_recorded(run):
    """To the last digit where torch and the CPU are those that the data was made with, and to 1e-4 elsewhere.

    Where the autoencoder decodes in bfloat16, means are compared to 2e-3.
    """
    here, there = curve.machine(), json.loads((DATA / "curve.json").read_text("utf-8"))["machine"]  # of the run as well
    tolerance = 0.0 if here == there else TOLERANCE
    last = read_lines(run / "evaluations.jsonl")[-1]
    record = json.loads(json.dumps(evaluate(run)))
    samples = [{key: old[key] for key in new} for new, old in zip(record["samples"], last["samples"], strict=True)]
    assert record.pop("average_moved") == pytest.approx(1 - 0.9**2), "which version 0.1 did not say"
    assert record.pop("interval")[0] < last["interval"][0] + (0.0 if FLOAT32 else TOLERANCE), (
        "Student's t, where version 0.1 had a bootstrap of 3 prompts"
    )
    assert record.pop("watched_intervals").keys() == last["watched_intervals"].keys()
    assert record.pop("weights") == "ema"
    recorded = {key: last[key] for key in record} | {"samples": samples}
    keys = record if FLOAT32 or not tolerance else MEANS
    found = curve.differences({k: record[k] for k in keys}, {k: recorded[k] for k in keys}, tolerance)
    assert not found, f"compared to {tolerance:g}, {here} with {there}:\n" + "\n".join(found[:20])
    assert record["update"] == 2
    assert record["reward"] != record["base_reward"], "the trained weights are read"


def test_it_resumes_for_one_more_update(run):
    """The third update and its evaluation are, but for rounding, what version 0.1 made of the same folder."""
    before = [(run / f"{name}.jsonl").read_text() for name in ("metrics", "evaluations")]
    assert train(RunConfig.load(run / "config.yaml", [f"out={run}", "updates=3"])) == run
    after = [(run / f"{name}.jsonl").read_text() for name in ("metrics", "evaluations")]
    assert all(new.startswith(old) for new, old in zip(after, before, strict=True)), "nothing was done anew"
    metrics, evaluations = read_lines(run / "metrics.jsonl"), read_lines(run / "evaluations.jsonl")
    assert [line["update"] for line in metrics] == [1, 2, 3]
    assert metrics[-1].keys() - metrics[0].keys() == {"samples_per_second", "peak_gib"}, "which version 0.1 did not say"
    assert metrics[0].keys() < metrics[-1].keys()
    assert metrics[-1]["drift"] == 0
    assert metrics[-1]["reward"] == pytest.approx(0.5510059, abs=TOLERANCE)
    assert metrics[-1]["grad_norm"] == pytest.approx(0.00388545, rel=1e-3 if FLOAT32 else 0.1)
    assert [line["update"] for line in evaluations] == [0, 2, 3]
    assert evaluations[-1]["base_reward"] == evaluations[0]["reward"]
    assert evaluations[-1]["difference"] == pytest.approx(0.00134761, abs=TOLERANCE)
    assert checkpoint.updates(run / "checkpoints")[-1] == 3
    assert "explore" in yaml.safe_load((run / "config.yaml").read_text())["algorithm"], "it is written as it is read"
    assert RunConfig.load(run / "config.yaml").updates == 3


def test_it_reports_and_exports(run):
    page = write_report(run).read_text("utf-8")
    assert "<svg" in page
    last = read_lines(run / "evaluations.jsonl")[-1]
    assert f"{last['reward']:.3f}" in page
    exported = load_file(export(run) / "pytorch_lora_weights.safetensors")
    kept = load_file(run / "lora/pytorch_lora_weights.safetensors")  # of the same update, written by version 0.1
    assert exported.keys() == kept.keys()
    assert all((exported[name] == kept[name]).all() for name in kept)
