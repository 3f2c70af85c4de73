"""Whole runs of tiny checkpoints of other kinds than the bundled one: what works there works here."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from flashgrpo.cli import app
from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import single_process
from flashgrpo.errors import UserError
from flashgrpo.evaluate import evaluate
from flashgrpo.export import export
from flashgrpo.models.load import load_model
from flashgrpo.models.source import Source
from flashgrpo.run.lines import read_lines
from flashgrpo.train import train
from flashgrpo.types import Prompt
from tests.families import KINDS
from tests.image_families import IMAGES
from tests.video_families import VIDEOS
from tests.videos import read_mp4

HEARS = "{loudness: {call: 'flashgrpo.rewards.loudness:loudness'}}"


def recipe(tmp_path, name):
    """A small run of a kind's checkpoint, saved as a recipe."""
    kind = KINDS[name]
    folder = tmp_path / "model"
    if not folder.exists():
        kind.build().save_pretrained(folder)
        for image in ("first.png", "last.png"):
            Image.new("RGB", (60, 60), "navy").save(tmp_path / image)
    for file, texts in (("train", ["a red circle", "a blue square"]), ("heldout", ["a green circle", "a cyan square"])):
        columns = {column: Path(image).name for column, image in kind.images(tmp_path).items()}
        lines = [json.dumps({"prompt": text, **columns}) for text in texts]
        (tmp_path / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    model = kind.config(folder).model_dump(mode="json")
    tree = {
        "out": str(tmp_path / "run"),
        "updates": 2,
        "model": model,
        "rollout": {"prompts": 2, "group_size": 2, "num_steps": 6, **kind.guidance},
        "optim": {"lr": 1e-2, "micro_batch": 2, "ema": {"decay": 0.5, "every": 1}},
        "prompts": {"train": str(tmp_path / "train.jsonl"), "heldout": str(tmp_path / "heldout.jsonl")},
        "rewards": {"compressibility": {"call": "flashgrpo.rewards.jpeg:compressibility"}},
        "evaluation": {"every": 2, "num_steps": 3, "videos": 1},
        "tracking": {"progress": False},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(tree))
    return path


@pytest.mark.parametrize(
    "name", ["wan21-both", "wan22-a14b", "wan22-5b-image", "skyreels-image", "ltx", *VIDEOS, *IMAGES]
)
def test_train_resume_evaluate_sample_export(name, tmp_path, monkeypatch):
    path = recipe(tmp_path, name)
    run = train(RunConfig.load(path, ["updates=1"]))
    assert train(RunConfig.load(path)) == run
    lines = read_lines(run / "metrics.jsonl")
    assert [line["update"] for line in lines] == [1, 2]
    assert all(line["drift"] == 0 for line in lines)
    best = [line["update"] for line in read_lines(run / "evaluations.jsonl") if line["best"]][-1]
    assert evaluate(run)["update"] == (best or 2), "the newest where none beat the base"
    image = [f"--{column.replace('_', '-')}={image}" for column, image in KINDS[name].images(tmp_path).items()]
    frames = KINDS[name].num_frames
    size = ["--size", "64", "64", str(frames)]
    options = [*image, *size, "--seed", "1", "--seed", "2", "--steps", "2", "--out", str(tmp_path / "a")]
    result = CliRunner().invoke(app, ["sample", str(run), "a red circle", *options])
    assert result.exit_code == 0, result.output
    from_file = ["--file", str(tmp_path / "heldout.jsonl"), "--steps", "2", "--out", str(tmp_path / "b")]
    assert CliRunner().invoke(app, ["sample", str(run), *from_file]).exit_code == 0
    if frames == 1:  # base and tuned beside each other, with gaps, and the two seeds in rows
        assert Image.open(tmp_path / "a.png").size == (64 + 4 + 64, 64 + 4 + 64)
        assert (tmp_path / "b.png").is_file()
    else:
        assert len(read_mp4(tmp_path / "a.mp4")) == len(read_mp4(tmp_path / "b.mp4")) == 2 * frames
    experts = 2 if name == "wan22-a14b" else 1
    for style in ("diffusers", "comfyui") if KINDS[name].comfyui else ("diffusers",):
        folder = export(run, style)
        assert len(list(folder.glob("*.safetensors"))) == experts
    folder = export(run, "diffusers", tmp_path / "again")
    card = (folder / "README.md").read_text()
    assert ('weight_name="low_noise.safetensors", load_into_transformer_2=True' in card) == (experts == 2)
    monkeypatch.chdir(folder)
    Path("model").symlink_to(tmp_path / "model")
    for image in ("first-frame.png", "last-frame.png"):
        Image.new("RGB", (64, 64), "navy").save(image)
    with warnings.catch_warnings():  # peft's of layers that are not trained, with names like those that are
        warnings.filterwarnings("ignore", "You have passed exclude_modules", UserWarning)
        exec(compile(card.split("```python\n")[1].split("```")[0], "README.md", "exec"), {})
    width, height = Image.open("image.png").size if frames == 1 else read_mp4("video.mp4").shape[:1:-1]
    assert (height, width) == (KINDS[name].height, KINDS[name].width), "the run's, not what the pipeline prefers"
    assert Path("sound.wav").is_file() == (name == "ltx2")


def test_the_same_weights_have_to_be_there(tmp_path):
    path = recipe(tmp_path, "wan21")
    run = train(RunConfig.load(path))
    weights = tmp_path / "model/transformer/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100:] = bytes(100)
    weights.write_bytes(content)
    for use in (lambda: export(run), lambda: evaluate(run), lambda: train(RunConfig.load(path, ["updates=3"]))):
        with pytest.raises(UserError, match=r"holds other weights than those that .* was trained on"):
            use()


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        ("wan21-image", ["prompts.train=flashgrpo:prompts/train.txt"], "this model starts from an image: give '"),
        ("wan21-both", ["model.num_frames=1"], "a video from a first frame to a last one has more than 1"),
        ("wan21", ["model.from_image=true"], "makes videos from text only"),
        ("wan21", ["rollout.guidance_scale_2=3"], "this model has one expert only"),
        ("wan21", ["model.attention=flush"], "model.attention: flush does not serve this model here"),
        ("ltx", ["model.attention=_native_flash"], "model.attention: _native_flash does not serve this model here"),
        ("wan21-image", ["model.max_sequence_length=256"], "tells text from image by 512 places of text, not 256"),
        ("wan21", ["model.height=40"], "model.height: 40 is no multiple of 16; the nearest is 32"),
        ("wan22-5b", ["model.height=48"], "model.height: 48 is no multiple of 32; the nearest is 64"),
        ("ltx", ["model.width=60"], "model.width: 60 is no multiple of 32; the nearest is 64"),
        ("ltx", ["model.num_frames=10"], "model.num_frames: 10 is no multiple of 8 plus 1; the nearest is 9"),
        ("ltx", ["model.train.targets=[to_z]"], "match no linear layer"),
        ("ltx2", ["model.max_sequence_length=10"], "10 is no multiple of the 4 registers that fill up a text"),
        ("ltx2", ["model.num_frames=1", "model.fps=100"], "1 frames at 100 a second is too short for a sound"),
        ("ltx2", ["model.width=32"], "model.width: 32 is too small for the autoencoder; the least is 64"),
        ("wan21", [f"rewards={HEARS}"], "rewards.loudness: it hears, and this model makes no sound; leave it out"),
    ],
)
def test_what_a_model_cannot_do(name, overrides, sentence, tmp_path):
    with pytest.raises(UserError) as error:
        train(RunConfig.load(recipe(tmp_path, name), overrides))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_image_that_cannot_be_read(tmp_path):
    path = recipe(tmp_path, "wan21-image")
    (tmp_path / "first.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"image .*first\.png cannot be read"):
        train(RunConfig.load(path))
    (tmp_path / "first.png").unlink()
    with pytest.raises(UserError, match=r"image .*first\.png cannot be read: no such file"):
        train(RunConfig.load(path))


@pytest.mark.parametrize("name", ["wan21", "wan22-a14b-image", "ltx"])
def test_random_weights_need_only_the_sizes(name, tmp_path):
    path = recipe(tmp_path, name)
    for weights in (tmp_path / "model").rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(UserError, match="could not be loaded"):
        train(RunConfig.load(path))
    run = train(RunConfig.load(path, ["model.random_init=true", "updates=1", "model.dtype=bfloat16"]))
    assert read_lines(run / "metrics.jsonl")[0]["grad_norm"] > 0


@pytest.mark.parametrize("name", ["wan21", "wan22-a14b"])
def test_two_processes_hold_half_of_bf16_networks_each(nursery, name, tmp_path):
    path = recipe(tmp_path, name)
    result = nursery.run("train", path, "parallel.shard=2", "model.dtype=bfloat16", "updates=1", size=2)
    [line] = read_lines(tmp_path / "run/metrics.jsonl")
    assert line["drift"] == 0
    assert line["grad_norm"] > 0
    assert str(result) == str(tmp_path / "run")


def test_compiled_blocks_serve_the_deterministic_steps_only(tmp_path, monkeypatch):
    """With a compiler that only counts: the recorded step is never compiled, so that the first ratio stays 1."""
    from torch._dynamo.testing import CompileCounter

    counter, usual = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: usual(*a, **{**k, "backend": counter}))
    run = train(RunConfig.load(recipe(tmp_path, "wan21"), ["model.compile=true", "updates=1"]))
    assert counter.frame_count > 0
    assert read_lines(run / "metrics.jsonl")[0]["drift"] == 0


def test_a_network_whose_texts_would_be_split_is_refused(nursery, tmp_path):
    ranks = nursery.start("train", recipe(tmp_path, "ltx"), "parallel.context=2", size=2)
    assert ranks.wait() == [2, 2]
    assert "diffusers would also split the texts of LTXVideoTransformer3DModel" in ranks.said()


def change(file, **entries):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in {**content, **entries}.items() if value != "gone"}))


@pytest.mark.parametrize(
    ("name", "file", "entries", "sentence"),
    [
        ("wan21", "model_index.json", {"transformer": [None, None]}, "has no transformer, which a WanPipeline"),
        ("wan21", "model_index.json", {"vae": "AutoencoderKLWan"}, "has no vae"),
        ("wan21", "model_index.json", {"boundary_ratio": 0.5}, "has no transformer_2"),
        ("hunyuan15", "guider/guider_config.json", {"guidance_rescale": 0.5}, "the guider of "),
        ("hunyuan15", "transformer/config.json", {"use_meanflow": True}, "is told the next step beside this one"),
        ("wan21", "vae/config.json", {"_class_name": "gone", "z_dim": "x"}, "could not be loaded"),
    ],
)
def test_a_checkpoint_with_odd_settings(name, file, entries, sentence, tmp_path):
    path = recipe(tmp_path, name)
    change(tmp_path / "model" / file, **entries)
    with pytest.raises(UserError) as error:
        train(RunConfig.load(path))
    assert sentence in str(error.value)


def test_an_older_checkpoint_lacks_entries(tmp_path):
    path = recipe(tmp_path, "wan21")
    change(tmp_path / "model/model_index.json", transformer_2="gone", boundary_ratio="gone", expand_timesteps="gone")
    assert train(RunConfig.load(path, ["updates=1"])).is_dir()


def test_images_may_move_but_not_change(tmp_path):
    path = recipe(tmp_path, "wan22-5b-image")
    train(RunConfig.load(path, ["updates=1"]))
    (tmp_path / "first.png").rename(tmp_path / "moved.png")
    for name in ("train", "heldout"):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(file.read_text().replace("first", "moved"))
    train(RunConfig.load(path, ["updates=2"]))
    Image.new("RGB", (60, 60), "red").save(tmp_path / "moved.png")
    with pytest.raises(UserError, match=r"prompts.train: the file has changed"):
        train(RunConfig.load(path, ["updates=3"]))


def test_a_last_frame_that_is_lacking(tmp_path):
    path, file = recipe(tmp_path, "wan21-both"), tmp_path / "train.jsonl"
    file.write_text(file.read_text().replace(', "last_image": "last.png"', ""))
    with pytest.raises(UserError, match=r"this model ends with an image: give '.*' one in a column `last_image`"):
        train(RunConfig.load(path))


def test_an_image_that_would_not_be_looked_at(tmp_path):
    run = train(RunConfig.load(recipe(tmp_path, "wan21"), ["updates=1"]))
    arguments = ["sample", str(run), "a red circle", "--image", str(tmp_path / "first.png"), "--steps", "2"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "a.mp4")])
    assert "starts from text only" in str(result.exception)


def test_a_lost_entry_is_made_again_without_an_encoder_that_stays(tmp_path):
    path = recipe(tmp_path, "wan21")
    cache = tmp_path / "cache"
    config = RunConfig.load(path, [f"model.condition_cache={cache}"])
    model = load_model(config.model, single_process(), 0)
    model.encode([Prompt("a red circle", {})])
    assert model.pipeline.text_encoder is None
    assert len(list(cache.rglob("*.safetensors"))) == 2  # and that of the negative prompt


def test_a_checkpoint_without_an_encoder_is_opened_once_for_all_prompts(tmp_path, monkeypatch):
    """Wan 2.2 I2V names a CLIP encoder and ships none: that must not be looked for again at every prompt."""
    path = recipe(tmp_path, "wan22-a14b-image")
    opened = []
    usual = Source._network
    monkeypatch.setattr(Source, "_network", lambda self, name: opened.append(name) or usual(self, name))
    prompts = [Prompt(f"a red circle {n}", {"image": str(tmp_path / "first.png")}) for n in range(5)]
    load_model(RunConfig.load(path).model, single_process(), 0, prompts)
    assert sorted(opened) == ["image_encoder", "text_encoder", "transformer", "transformer_2", "vae"]
