"""A language model that fills masks, trained as any model is: a run of a tiny random one, from recipe to export."""

from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import single_process
from flashgrpo.evaluate import evaluate
from flashgrpo.export import export
from flashgrpo.models.load_tokens import load_token_model
from flashgrpo.models.lora import trained_parameters
from flashgrpo.report import write_report
from flashgrpo.run import checkpoint
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.lines import read_lines
from flashgrpo.sample import sample
from flashgrpo.train import train
from flashgrpo.types import Prompt
from tests.models.test_llada import LORA, Plain, logits, write

REWARD = """
def words(texts, prompts, **columns):
    return [float(text.split().count("a")) for text in texts]
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe of two groups of two texts of four tokens."""
    folder = tmp_path_factory.mktemp("agrpo")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write(folder / "model", Plain())
    (folder / "reward.py").write_text(REWARD)
    for name, lines in (("train", "sum of a b\nsum of c\n"), ("heldout", "sum of d\nof a\n")):
        (folder / f"{name}.txt").write_text(lines)
    train_lora = {**LORA, "targets": list(LORA["targets"])}
    settings = {
        "out": str(folder / "run"),
        "updates": 2,
        "model": {"path": str(folder / "model"), "length": 4, "max_sequence_length": 6, "train": train_lora},
        "algorithm": {"preset": "agrpo", "explore": {"top_k": 8}, "score": {"steps": 1}},
        "rollout": {"prompts": 2, "group_size": 2, "num_steps": 2, "block": 2, "micro_batch": 2},
        "optim": {"lr": 0.1, "micro_batch": 2, "ema": {"decay": 0.5, "every": 1}},
        "prompts": {"train": str(folder / "train.txt"), "heldout": str(folder / "heldout.txt")},
        "rewards": {"words": {"call": f"{folder / 'reward.py'}:words"}},
        "evaluation": {"every": 1, "videos": 1},
        "checkpoint": {"every": 1},
        "tracking": {"progress": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def finished(recipe) -> Path:
    return train(RunConfig.load(recipe))


def test_a_run_records_texts_and_a_first_ratio_of_one(finished):
    metrics, evaluations = (read_lines(finished / f"{name}.jsonl") for name in ("metrics", "evaluations"))
    assert [line["drift"] for line in metrics] == [0, 0]
    assert metrics[0]["compute"] == {"rollout": 8, "update": 12}
    assert [line["update"] for line in evaluations] == [0, 1, 2]
    texts = sorted(file.name for file in (finished / "videos/000000").iterdir())
    assert [Path(name).suffix for name in texts] == [".txt"]
    text = (finished / "videos/000000" / texts[0]).read_text("utf-8")
    assert text.strip() in write_report(finished).read_text("utf-8")


def test_a_run_that_was_interrupted_ends_with_the_same_weights(recipe, finished, tmp_path):
    out = f"out={tmp_path}/run"
    train(RunConfig.load(recipe, [out, "updates=1"]))
    again = train(RunConfig.load(recipe, [out]))
    one, other = (checkpoint.load(run / "checkpoints", 2) for run in (finished, again))
    for kind, tensors in one.items():
        assert all(torch.equal(tensor, other[kind][name]) for name, tensor in tensors.items())
    assert evaluate(finished)["reward"] == evaluate(again)["reward"]


def test_the_result_is_sampled_and_exported(finished, tmp_path):
    out = sample(finished, [Prompt("sum of d", {})], tmp_path / "texts", seeds=[1, 2], num_steps=4)
    assert out.suffix == ".txt"
    adapters, merged = (export(finished, form, checkpoint_update=2) for form in ("diffusers", "merged"))
    config = RunDirectory.existing(finished)[1]
    averaged = checkpoint.load(finished / "checkpoints", 2, kinds=["ema"])["ema"]
    trained = load_token_model(config.model, single_process(), 0)
    for name, parameter in trained_parameters(trained.network).items():
        parameter.data.copy_(averaged[name])
    expected = logits(trained)
    whole = config.model.model_copy(update={"path": str(merged)})
    torch.testing.assert_close(logits(load_token_model(whole, single_process(), 0)), expected, rtol=1e-4, atol=1e-5)
    plain = Plain()
    plain.load_state_dict(load_file(Path(config.model.path) / "model.safetensors"))
    found = PeftModel.from_pretrained(plain, adapters)(torch.tensor([[2, 7, 8, 3, 4, 2, 4, 1, 1, 5]]))[:, -4:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_killed_at_any_write_it_ends_with_the_same_weights(recipe, finished, tmp_path, nursery):
    settings = yaml.safe_load(recipe.read_text()) | {"out": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    for write_number in (20, 45):
        assert nursery.start("train_and_die", tmp_path / "recipe.yaml", write_number).wait() != [0]
    run = Path(nursery.run("train", tmp_path / "recipe.yaml"))
    one, other = (checkpoint.load(each / "checkpoints", 2) for each in (finished, run))
    assert all(torch.equal(tensor, other[kind][name]) for kind in one for name, tensor in one[kind].items())


def test_two_processes_train_what_one_does(recipe, finished, tmp_path, nursery):
    two = Path(nursery.run("train", recipe, f"out={tmp_path}/two", size=2))
    one, other = (read_lines(run / "metrics.jsonl") for run in (finished, two))
    assert [line["reward"] for line in one] == [line["reward"] for line in other]
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in other], abs=1e-6)


def test_sharded_processes_draw_the_same_texts(recipe, finished, tmp_path, nursery):
    sharded = Path(nursery.run("train", recipe, f"out={tmp_path}/two", "parallel.shard=2", "updates=1", size=2))
    (line,) = read_lines(sharded / "metrics.jsonl")
    assert line["reward"] == read_lines(finished / "metrics.jsonl")[0]["reward"]
    assert line["drift"] == 0
