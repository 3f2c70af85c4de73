"""Self-Forcing's single file: its layout with tiny widths, and what is wrong with a file that is not one."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashgrpo.errors import UserError
from flashgrpo.models.architectures import Architecture
from flashgrpo.models.causal.checkpoint import GeneratorSource, read_generator
from tests.families import KINDS, Kind

TO_ORIGINAL = (  # as the modules of Self-Forcing's network are called
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    (".to_out.0.", ".o."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    (".norm2.", ".norm3."),
    ("proj_out", "head.head"),
)


def original(name: str) -> str:
    for ours, theirs in TO_ORIGINAL:
        name = name.replace(ours, theirs)
    name = re.sub(r"^scale_shift_table$", "head.modulation", name)
    return f"model.{name.replace('scale_shift_table', 'modulation')}"


@pytest.fixture(scope="module")
def kind() -> Kind:
    return KINDS["wan21"]


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "model"
    kind.build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(kind) -> dict[str, Tensor]:
    """Of another network than the folder's."""
    return {name: tensor + 1 for name, tensor in kind.build().transformer.state_dict().items()}


def source(kind: Kind, folder: Path, file: Path) -> GeneratorSource:
    return GeneratorSource(Architecture.of_folder(folder), folder, kind.config(folder), file)


@pytest.mark.parametrize("key", ["generator_ema", "generator"])
def test_a_generator_has_the_weights_of_its_file(kind, folder, weights, tmp_path, key):
    content = {"generator": {original(name): -tensor for name, tensor in weights.items()}, "step": 3}
    content[key] = {original(name): tensor for name, tensor in weights.items()}
    torch.save(content, file := tmp_path / "self_forcing.pt")
    loaded = source(kind, folder, file)
    loaded.load(["transformer"])
    tensors = loaded.pipeline.transformer.state_dict()
    assert tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[name], weights[name]) for name in weights)
    x, text = torch.zeros(1, 16, 3, 4, 4), torch.zeros(1, 2, 24)
    assert loaded.pipeline.transformer(x, torch.zeros(1), text, return_dict=False)[0].isfinite().all()


class Unsafe:
    """What only running it would rebuild."""


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "the streaming generator: there is no file "),
        (b"nonsense", "holds no tensors alone: "),
        ({"generator": Unsafe()}, "holds no tensors alone: "),
        ({"critic": {}}, "has neither generator_ema nor generator in it"),
        ([1], "has neither generator_ema nor generator in it"),
    ],
    ids=["none", "nonsense", "code", "critic", "list"],
)
def test_a_file_that_is_none(tmp_path, content, sentence):
    file = tmp_path / "generator.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(UserError, match=sentence):
        read_generator(file)


def test_weights_of_another_network(kind, folder, weights, tmp_path):
    names = [original(name) for name in weights]
    tensors = dict(zip(names, weights.values(), strict=True))
    tensors["model.blocks.7.self_attn.q.weight"] = tensors.pop("model.blocks.1.self_attn.q.weight")
    torch.save({"generator": tensors}, file := tmp_path / "generator.pt")
    with pytest.raises(
        UserError, match=r"blocks.1.attn1.to_q.weight is missing; blocks.7.attn1.to_q.weight belongs to"
    ):
        source(kind, folder, file).load(["transformer"])
