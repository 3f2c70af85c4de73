"""What is loaded is what was meant: each weight comes from the files, under its own name, whole and finite."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashgrpo.errors import UserError
from flashgrpo.models.architectures import Architecture
from flashgrpo.models.settings import ModelConfig
from flashgrpo.models.source import Source
from tests.conftest import WEIGHTS
from tests.families import KINDS

FILES = {
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled checkpoint."""
    return shutil.copytree(WEIGHTS, tmp_path / "copy")


def source_of(folder, **settings) -> Source:
    config = ModelConfig(path=str(folder), height=48, width=80, num_frames=9, **settings)
    return Source(Architecture.of_folder(folder), folder, config)


def load(folder, component, **settings):
    """One component, as a run loads it; the autoencoder comes first, always."""
    source = source_of(folder, **settings)
    source.load([component] if component != "vae" else [])
    return getattr(source.pipeline, component)


def change(file, edit):
    tensors = load_file(file)
    save_file(edit(tensors), file, metadata={"format": "pt"})


def without(tensors, name=None):
    return {key: tensor for key, tensor in tensors.items() if key != (name or first(tensors))}


def filled(tensors, value):
    """With one value changed, in float32."""
    name = first(tensors)
    changed = tensors[name].float()
    changed.view(-1)[-1] = value
    return {**tensors, name: changed}


def first(tensors) -> str:
    """The name of the largest weight, which is a matrix."""
    return max(tensors, key=lambda name: tensors[name].numel())


FAULTS = {
    "missing": (without, r"{} is missing"),
    "unexpected": (lambda t: {**t, "stray": torch.zeros(3)}, "stray belongs to no part of it"),
    "misnamed": (lambda t: {**without(t), "odd": t[first(t)]}, "{} is missing; odd belongs to no part of it"),
    "prefixed": (
        lambda t: {f"model.{name}": v for name, v in t.items()},
        r" and \d+ more are missing; model\..* belong",
    ),
    "shape": (lambda t: {**t, first(t): t[first(t)][..., :-1].contiguous()}, r"{} should be \[.*\], not \["),
    "nan": (lambda t: filled(t, float("nan")), "not finite in float32: {}"),
    "infinite": (lambda t: filled(t, -float("inf")), "not finite in float32: {}"),
}


@pytest.mark.parametrize(
    ("component", "fault"), [("text_encoder", fault) for fault in FAULTS] + [("vae", "missing"), ("transformer", "nan")]
)
def test_weights_that_are_not_those_of_the_network_are_named(folder, component, fault):
    edit, sentence = FAULTS[fault]
    file = folder / component / FILES[component]
    name = first(load_file(file))
    change(file, edit)
    with pytest.raises(UserError, match=rf"model.path: {component} of .*{sentence.format(name)}"):
        load(folder, component)


@pytest.mark.parametrize(
    ("component", "length"), [("text_encoder", 0), ("text_encoder", 5), ("transformer", 1000), ("vae", -1)]
)
def test_files_that_were_cut_are_named(folder, component, length):
    file = folder / component / FILES[component]
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match=f"model.path: {component} of .* could not be loaded"):
        load(folder, component)


def in_two(folder, component) -> tuple:
    """Its weights in two files, with the index that both libraries write."""
    file = folder / component / FILES[component]
    tensors, stem = load_file(file), FILES[component].partition(".")[0]
    names = sorted(tensors)
    shards = {f"{stem}-00001-of-00002.safetensors": names[::2], f"{stem}-00002-of-00002.safetensors": names[1::2]}
    for shard, own in shards.items():
        save_file({name: tensors[name] for name in own}, file.with_name(shard), metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {name: s for s, own in shards.items() for name in own}}
    (file.parent / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    return file.with_name(min(shards)), names[0]


@pytest.mark.parametrize("component", ["text_encoder", "transformer"])
def test_shards(folder, component):
    whole = load(WEIGHTS, component).state_dict()
    shard, name = in_two(folder, component)
    sharded = load(folder, component).state_dict()
    assert all(torch.equal(sharded[key], whole[key]) for key in whole)
    change(shard, lambda tensors: without(tensors, name))  # which the index still promises
    with pytest.raises(UserError, match=rf"{component} of .*{name} is missing"):
        load(folder, component)
    shard.unlink()
    with pytest.raises(UserError, match=f"model.path: {component} of .* could not be loaded"):
        load(folder, component)


@pytest.mark.parametrize("component", ["text_encoder", "transformer"])
def test_files_of_pytorch_and_variants(folder, component):
    file = folder / component / FILES[component]
    tensors = load_file(file)
    file.rename(file.with_name(FILES[component].replace(".", ".fp16.")))
    with pytest.raises(UserError, match=f"model.path: {component} of .* could not be loaded"):
        load(folder, component)
    name = "pytorch_model.bin" if component == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(tensors, file.with_name(name))
    loaded = load(folder, component).state_dict()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    torch.save(without(tensors), file.with_name(name))
    with pytest.raises(UserError, match=f"{component} of .* is missing"):
        load(folder, component)
    file.with_name(name).write_bytes(b"")
    with pytest.raises(UserError, match=f"model.path: {component} of .* could not be loaded"):
        load(folder, component)


SHARED, EMBED = "shared.weight", "encoder.embed_tokens.weight"


@pytest.mark.parametrize("names", [(SHARED,), (EMBED,), (SHARED, EMBED), ()])
@pytest.mark.parametrize("tie", [True, False, None])
@pytest.mark.parametrize("kind", ["UMT5EncoderModel", "T5EncoderModel"])
def test_tied_weights_count_once(folder, names, tie, kind):
    tensors = load_file(folder / "text_encoder/model.safetensors")
    table = tensors[SHARED]
    rest = {name: tensor for name, tensor in tensors.items() if name not in (SHARED, EMBED)}
    tensors = {**rest, **{name: table.clone() for name in names}}
    save_file(tensors, folder / "text_encoder/model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "text_encoder/config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (folder / "text_encoder/config.json").write_text(
        json.dumps(config if tie is None else {**config, "tie_word_embeddings": tie})
    )
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": ["transformers", kind]}))
    source = source_of(folder)
    if not names:
        with pytest.raises(UserError, match=f"{EMBED} and 1 more are missing"):
            source.load(["text_encoder"])
        return
    source.load(["text_encoder"])
    encoder = source.pipeline.text_encoder
    assert torch.equal(encoder.encoder.embed_tokens.weight, table)
    assert torch.equal(encoder.shared.weight, table)


def test_an_image_encoder_is_held_to_the_same_and_may_bring_its_positions(tmp_path):
    KINDS["wan21-image"].build().save_pretrained(tmp_path)
    file = tmp_path / "image_encoder/model.safetensors"
    change(file, lambda t: {**t, "vision_model.embeddings.position_ids": torch.arange(257)[None]})
    load(tmp_path, "image_encoder")
    change(file, without)
    with pytest.raises(UserError, match=r"model.path: image_encoder of .* is missing"):
        load(tmp_path, "image_encoder")


def test_the_second_of_two_experts(tmp_path):
    KINDS["wan22-a14b"].build().save_pretrained(tmp_path)
    change(tmp_path / "transformer_2" / FILES["transformer"], without)
    load(tmp_path, "transformer")
    with pytest.raises(UserError, match=r"model.path: transformer_2 of .* is missing"):
        load(tmp_path, "transformer_2")


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (["os", "system"], "text_encoder of .* is system of os, which is no network"),
        (["transformers", "NoSuchModel"], "is NoSuchModel of transformers, which is no network"),
        ([None, None], "is None of None, which is no network"),
        (["transformers", "AutoTokenizer"], "text_encoder of .* could not be loaded"),
        ("text", "is no network"),
    ],
)
def test_components_that_are_no_networks(folder, entry, sentence):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": entry}))
    with pytest.raises(UserError, match=sentence):
        load(folder, "text_encoder")
