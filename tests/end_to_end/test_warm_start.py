"""Runs that begin with the adapters of another: their base is the model as it then was, and all goes on from there."""

import pytest
import torch

from flashgrpo.config import RunConfig
from flashgrpo.doctor.estimate import estimate
from flashgrpo.errors import UserError
from flashgrpo.evaluate import evaluate
from flashgrpo.export import export
from flashgrpo.run import checkpoint
from flashgrpo.run.lines import read_lines
from flashgrpo.train import train
from tests.conftest import small_run
from tests.end_to_end.test_families import recipe

KL = "algorithm.objective.kl_coef=0.1"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The adapters of a run's second update, and the reward that they were evaluated with."""
    config = small_run(
        tmp_path_factory.mktemp("first") / "run", "updates=2", "optim.lr=1e-2", "optim.ema={decay: 0, every: 1}"
    )
    run = train(config)
    return export(run, "comfyui", checkpoint_update=2), read_lines(run / "evaluations.jsonl")[-1]["reward"]


def begun(folder, first, *overrides):
    folder.mkdir(exist_ok=True)
    return small_run(folder / "run", f"model.adapters={first[0]}", "optim.lr=1e-3", "evaluation.every=1", *overrides)


@pytest.mark.parametrize("merge", [False, True])
def test_train_resume_evaluate_export(merge, first, tmp_path, monkeypatch):
    overrides = (KL, f"model.merge_adapters={merge}")
    run = train(begun(tmp_path / "a", first, "updates=1", *overrides))
    [line] = read_lines(run / "metrics.jsonl")
    assert line["drift"] == 0
    assert line["kl"] == pytest.approx(0, abs=1e-9), "the first policy is its own base"
    base = read_lines(run / "evaluations.jsonl")[0]
    assert base["reward"] == pytest.approx(first[1], rel=1e-4), "which has the adapters that the other run ended with"
    assert train(begun(tmp_path / "a", first, "updates=2", *overrides)) == run
    assert read_lines(run / "metrics.jsonl")[1]["kl"] > 0
    whole = train(begun(tmp_path / "b", first, "updates=2", *overrides))
    resumed, uninterrupted = (checkpoint.load(folder / "checkpoints", 2)["ema"] for folder in (run, whole))
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)
    assert evaluate(run, checkpoint_update=1)["base_reward"] == pytest.approx(first[1], rel=1e-4)
    card = (export(run, "diffusers") / "README.md").read_text()
    told = "merged before training: load them first" if merge else "trained further"
    assert f"- Began with: the adapters `comfyui`, {told}\n" in card
    monkeypatch.chdir(run / "export/diffusers")
    (run / "export/diffusers/comfyui").symlink_to(first[0])
    exec(compile(card.split("```python\n")[1].split("```")[0], "README.md", "exec"), {})
    assert "load them first" not in (export(run, "merged") / "README.md").read_text()


def test_the_file_may_not_change(first, tmp_path):
    copy = tmp_path / "lora.safetensors"
    copy.write_bytes((first[0] / "pytorch_lora_weights.safetensors").read_bytes())
    run = train(begun(tmp_path / "a", (copy,), "updates=1"))
    content = bytearray(copy.read_bytes())
    content[-100:] = bytes(100)
    copy.write_bytes(content)
    with pytest.raises(UserError, match=r"holds other weights than those that .* was trained on, or model\.adapters"):
        export(run)


def test_two_processes_hold_half_of_it_each(nursery, first, tmp_path):
    config = begun(tmp_path / "a", first, "updates=1", "parallel.shard=2", KL)
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    nursery.run("train", tmp_path / "recipe.yaml", size=2)
    [line] = read_lines(tmp_path / "a/run/metrics.jsonl")
    assert (line["drift"], line["kl"]) == (0, pytest.approx(0, abs=1e-9))
    assert read_lines(tmp_path / "a/run/evaluations.jsonl")[0]["reward"] == pytest.approx(first[1], rel=1e-4)


def test_the_start_is_one_more_copy_of_what_is_trained(first, tmp_path):
    config = begun(tmp_path, first)
    other = config.model_copy(update={"model": config.model.model_copy(update={"merge_adapters": True})})
    further, merged = estimate(config), estimate(other)
    apart = further.phases["update"]["learning"] - merged.phases["update"]["learning"]
    assert apart == further.parameters["trained"] * 4


def test_two_experts(tmp_path):
    path = recipe(tmp_path, "wan22-a14b")
    lora = export(train(RunConfig.load(path)), "diffusers", checkpoint_update=2)
    later = [f"out={tmp_path / 'later'}", f"model.adapters={lora}", KL, "updates=1"]
    run = train(RunConfig.load(path, later))
    assert [line["drift"] for line in read_lines(run / "metrics.jsonl")] == [0]
    bases = [read_lines(folder / "evaluations.jsonl") for folder in (tmp_path / "run", run)]
    assert bases[1][0]["reward"] == pytest.approx(bases[0][-1]["reward"], rel=1e-4)
    assert len(list(export(run, "comfyui", checkpoint_update=1).glob("*.safetensors"))) == 2
