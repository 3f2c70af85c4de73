"""What others load is what was trained."""

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, WanPipeline
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from flashgrpo.card import Shown, model_card, public
from flashgrpo.cli import app
from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import single_process
from flashgrpo.errors import UserError
from flashgrpo.export import export
from flashgrpo.models.load import load_model
from flashgrpo.models.lora import weights_replaced
from flashgrpo.run import checkpoint
from flashgrpo.run.lines import read_lines
from flashgrpo.train import train
from flashgrpo.types import Prompt
from tests.conftest import WEIGHTS, small_run


def finished_run(folder: Path, *overrides: str):
    config = small_run(folder / "run", "updates=2", "optim.lr=1e-2", "optim.ema={decay: 0, every: 1}", *overrides)
    return config, train(config)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A run that trained adapters on every kind of layer that has a name in both styles."""
    targets = "[to_q, to_k, to_v, to_out.0, ffn.net.0.proj, ffn.net.2]"
    return finished_run(
        tmp_path_factory.mktemp("lora"),
        f"model.train={{kind: lora, rank: 4, alpha: 10, targets: {targets}}}",
        "evaluation.videos=1",
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("full"), "model.train={kind: full}", "optim.lr=1e-4")


def velocities(run, network) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(base, trained policy, what `network` computes) for one input."""
    config, folder = run
    model = load_model(config.model, single_process(), config.seed)
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    text, timestep = (
        model.encode([Prompt("a red circle moving left slowly", {})]).tensors["text"],
        torch.tensor([500.0]),
    )
    update = checkpoint.choose(folder / "checkpoints", None, print)
    with torch.no_grad():
        base = model.network(x, timestep, text, return_dict=False)[0]
        with weights_replaced(model.network, checkpoint.load(folder / "checkpoints", update)["ema"]):
            trained = model.network(x, timestep, text, return_dict=False)[0]
        return base, trained, network(x, timestep, text, return_dict=False)[0]


@pytest.mark.parametrize("style", ["diffusers", "comfyui"])
def test_adapters_give_diffusers_the_trained_velocity(lora, style):
    _, run = lora
    folder = export(run, style)
    pipeline = WanPipeline.from_pretrained(WEIGHTS, dtype=torch.float32)
    pipeline.load_lora_weights(folder)
    base, trained, loaded = velocities(lora, pipeline.transformer)
    assert not torch.allclose(base, trained, atol=1e-3)
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-5)
    card = (folder / "README.md").read_text()
    assert "rank 4, alpha 10" in card
    line = read_lines(run / "evaluations.jsonl")[-1]
    assert f"Held-out reward {line['reward']:.3f}" in card
    assert str(run.parent) not in card
    assert "(kind=" not in card
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["library_name"], head["base_model"]) == ("diffusers", "flashgrpo:tiny/weights")
    assert {"text-to-video", "lora"} <= set(head["tags"])


def test_a_card_shows_samples_and_the_recipe(lora):
    config, run = lora
    folder = export(run, "diffusers")
    text = (folder / "README.md").read_text()
    shown = sorted(file.name for file in (folder / "samples").iterdir())
    assert shown == ["0-base.mp4", "0-tuned.mp4"]
    line = next(line for line in read_lines(run / "evaluations.jsonl") if line["update"] == best_of(run))
    kept = line["samples"][0]
    assert (folder / "samples/0-tuned.mp4").read_bytes() == (run / kept["video"]).read_bytes()
    assert (folder / "samples/0-base.mp4").read_bytes() == (run / kept["base_video"]).read_bytes()
    assert f'| `{kept["prompt"]}` | <video src="samples/0-base.mp4" width="240" autoplay' in text
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["widget"] == [{"text": kept["prompt"], "output": {"url": "samples/0-tuned.mp4"}}]
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["prompts"]["heldout"] == Path(config.prompts.heldout).name
    again = RunConfig.parse(recipe | {"out": "x"}, "the card")
    assert (again.algorithm, again.optim, again.rollout) == (config.algorithm, config.optim, config.rollout)


def best_of(run: Path) -> int:
    return checkpoint.choose(run / "checkpoints", None, print)


def test_a_card_of_texts_and_images_and_odd_prompts(lora):
    config, _ = lora
    shown = [
        Shown("a | `b`\n*c*", "samples/0-base.png", "samples/0-tuned.png"),
        Shown("d", "0-base.txt", "0-tuned.txt"),
    ]
    text = model_card(config, "diffusers", ["a.safetensors"], 4, None, False, shown=shown)
    assert "| `'a \\| \\x60b\\x60\\n*c*'` | ![](samples/0-base.png) | ![](samples/0-tuned.png) |" in text
    assert "| `d` | [text](0-base.txt) | [text](0-tuned.txt) |" in text
    assert len(yaml.safe_load(text.split("---\n")[1])["widget"]) == 1
    assert "## Samples" not in model_card(config, "diffusers", ["a.safetensors"], 4, None, False)


@pytest.mark.parametrize("format", ["diffusers", "merged"])
def test_the_program_of_the_card_runs(lora, format, monkeypatch):
    folder = export(lora[1], format)
    program = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    exec(compile(program, "README.md", "exec"), {})
    assert (folder / "video.mp4").stat().st_size > 0


def test_a_card_of_images_saves_one(lora, tmp_path, monkeypatch):
    config = RunConfig.load(lora[1] / "config.yaml", ["model.num_frames=1"])
    card = model_card(config, "merged", [], 4, None, image=False)
    assert "- Images: " in card
    assert yaml.safe_load(card.split("---\n")[1])["pipeline_tag"] == "text-to-image"
    monkeypatch.chdir(export(lora[1], "merged", tmp_path / "merged"))
    exec(compile(card.split("```python\n")[1].split("```")[0], "README.md", "exec"), {})
    assert Image.open("image.png").size == (config.model.width, config.model.height)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("/home/me/models/wan", "wan"),
        ("flashgrpo:tiny/prompts/train.jsonl", "flashgrpo:tiny/prompts/train.jsonl"),
        ("/data/a.py:mine", "a.py:mine"),
        ("datasets:/data/clips", "datasets:clips"),
        ("datasets:user/clips:train", "datasets:user/clips:train"),
        ("http://10.0.0.1:80", "a reward server"),
        ("weights, old", "weights, old"),
    ],
)
def test_a_card_names_no_folder_of_the_machine(path, told):
    assert public(path) == told


def test_comfyui_gets_the_original_names(lora):
    _, run = lora
    tensors = load_file(export(run, "comfyui") / "pytorch_lora_weights.safetensors")
    layers = {name.split(".lora_")[0] for name in tensors if ".blocks.0." in name}
    names = [f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"]
    assert layers == {f"diffusion_model.blocks.0.{name}" for name in [*names, "ffn.0", "ffn.2"]}
    assert len(tensors) == 6 * 10 * 2


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_merged_pipeline_is_the_trained_one(kind, request, tmp_path):
    run = request.getfixturevalue(kind)
    folder = export(run[1], "merged", tmp_path / "merged")
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    assert not [name for name in pipeline.transformer.state_dict() if "lora" in name]
    base, trained, loaded = velocities(run, pipeline.transformer)
    assert not torch.allclose(base, trained, atol=1e-4)
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_exported(lora, full, tmp_path):
    with pytest.raises(UserError, match="trained every weight, so there are no adapters"):
        export(full[1], "comfyui")
    (tmp_path / "taken.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export(lora[1], "merged", tmp_path)
    with pytest.raises(UserError, match="no run directory"):
        export(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of update 99"):
        export(lora[1], checkpoint_update=99)
    result = CliRunner().invoke(app, ["export", str(lora[1]), "--format", "difusers"])
    assert isinstance(result.exception, UserError)
    assert "diffusers" in str(result.exception)


def test_a_layer_without_an_original_name(tmp_path):
    run = finished_run(tmp_path, "model.train={kind: lora, rank: 2, targets: [proj_out]}", "updates=1")
    with pytest.raises(UserError, match="layer proj_out has no name there"):
        export(run[1], "comfyui")
    assert not (run[1] / "export/comfyui").exists()
    assert export(run[1], "diffusers").is_dir()
