"""Whole runs of a tiny URSA with random weights: the process of uniform tokens from the command line to the export."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from flashgrpo.cli import app
from flashgrpo.config import RunConfig
from flashgrpo.errors import UserError
from flashgrpo.evaluate import evaluate
from flashgrpo.export import export
from flashgrpo.run import checkpoint
from flashgrpo.run.lines import read_lines
from flashgrpo.train import train
from tests.ursa import config, write_checkpoint


def recipe(tmp_path: Path, *names: str) -> Path:
    """Save a small run as a recipe."""
    folder = tmp_path / "model"
    if not folder.exists():
        write_checkpoint(folder)
    for file, texts in (("train", ["two red cells", "red"]), ("heldout", ["two cells", "red red"])):
        (tmp_path / f"{file}.txt").write_text("\n".join(texts) + "\n")
    train = {"kind": "lora", "rank": 2, "targets": ["q_proj", "down_proj"]}
    tree = {
        "out": str(tmp_path / "run"),
        "updates": 2,
        "algorithm": "udm-grpo",
        "model": {**config(folder).model_dump(mode="json"), "train": train},
        "rollout": {"prompts": 2, "group_size": 3, "num_steps": 5, "micro_batch": 4},
        "optim": {"lr": 1e-2, "micro_batch": 2, "ema": {"decay": 0.5, "every": 1}},
        "prompts": {"train": str(tmp_path / "train.txt"), "heldout": str(tmp_path / "heldout.txt")},
        "rewards": {"brightness": {"call": "tests.end_to_end.test_uniform_tokens:brightness"}},
        "evaluation": {"every": 2, "num_steps": 3, "videos": 1},
        "checkpoint": {"every": 1},
        "tracking": {"progress": False},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(tree))
    return path


def brightness(images, prompts, **columns):
    assert images.shape[2:] == (3, 4, 6) or images.shape[1:] == (3, 4, 6)
    return images.flatten(1).mean(dim=1)


def weights(run: Path, update: int) -> dict[str, torch.Tensor]:
    found = checkpoint.load(run / "checkpoints", update)
    return {f"{kind}/{name}": tensor for kind, named in found.items() for name, tensor in named.items()}


def test_train_resume_evaluate_sample_export(tmp_path):
    path = recipe(tmp_path)
    run = train(RunConfig.load(path, ["updates=1"]))
    assert train(RunConfig.load(path)) == run
    lines = read_lines(run / "metrics.jsonl")
    assert [line["update"] for line in lines] == [1, 2]
    assert all(line["drift"] == 0 for line in lines)
    assert lines[0]["kl"] == 0
    assert lines[0]["compute"] == {"rollout": 6 * 5, "update": 6 * 3 * 4}
    assert sum(lines[0]["transitions_by_step"].values()) == 6 * 3
    whole = train(RunConfig.load(path, [f"out={tmp_path}/whole"]))
    resumed, expected = weights(run, 2), weights(whole, 2)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    assert evaluate(run)["update"] in (1, 2)
    options = ["--seed", "1", "--steps", "2", "--out", str(tmp_path / "a.png")]
    result = CliRunner().invoke(app, ["sample", str(run), "two red", *options])
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "a.png").size == (6 + 4 + 6, 4)  # the base beside it
    adapters = export(run, "diffusers")
    assert (adapters / "adapter_model.safetensors").is_file()
    assert 'PeftModel.from_pretrained(network, ".")' in (adapters / "README.md").read_text()
    merged = export(run, "merged", tmp_path / "merged")
    assert (merged / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert (merged / "scheduler" / "scheduler_model.pth").is_file()
    assert "is laid out as that of `model` and is loaded by the same code" in (merged / "README.md").read_text()


def test_killed_at_any_write_it_ends_with_the_same_weights(tmp_path, nursery):
    path = recipe(tmp_path)
    whole = train(RunConfig.load(path, [f"out={tmp_path}/whole"]))
    for write in (20, 45):
        assert nursery.start("train_and_die", path, write).wait() != [0]
    run = Path(nursery.run("train", path))
    found, expected = weights(run, 2), weights(whole, 2)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("train", ["{kind: full}", "{kind: lora, rank: 2, targets: [q_proj, down_proj]}"])
def test_on_two_processes_that_hold_the_network_between_them(tmp_path, nursery, train):
    """Logits are computed again in the backward pass a few at a time, and so are the blocks."""
    path, overrides = recipe(tmp_path), ["updates=1", f"model.train={train}", "model.gradient_checkpointing=true"]
    alone = Path(nursery.run("train", path, f"out={tmp_path}/alone", *overrides))
    for name, more in (("beside", []), ("between", ["parallel.shard=2"])):
        run = Path(nursery.run("train_in_chunks", path, f"out={tmp_path}/{name}", *overrides, *more, size=2))
        found, expected = (read_lines(one / "metrics.jsonl")[0] for one in (run, alone))
        assert found["drift"] == 0
        for key in ("reward", "grad_norm", "kl"):
            assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rollout.guidance_scale=3", "guidance_scale"),
        ("rollout.kind=flow", "explore.kind uniform-tokens is of uniform-tokens; leave it out"),
        ("algorithm.objective.kind=competing", "of uniform tokens there are log-probabilities"),
        ("algorithm.score.times=9", "9 trained steps from one of the first 3 on are more than rollout.num_steps 5"),
        ("algorithm=agrpo", "no mask token"),
        ("algorithm=flash-grpo", "URSAPipeline"),
        ("model.num_frames=5", "draws images; take 1, not 5"),
        ("parallel.context=2", "context"),
    ],
)
def test_what_cannot_be_gets_one_sentence(tmp_path, override, named):
    with pytest.raises(UserError) as error:
        train(RunConfig.load(recipe(tmp_path), [override]))
    assert named in str(error.value)
