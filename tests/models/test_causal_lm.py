"""Causal language models: what is loaded, what is refused, and what is written."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flashgrpo.distributed.world import World, single_process
from flashgrpo.errors import UserError
from flashgrpo.models.causal_lm import CausalLm
from flashgrpo.models.load import META
from flashgrpo.models.lora import trained_parameters
from flashgrpo.models.settings import Lora, ModelConfig
from tests.programs import WORDS, language_model, write_language_model


@pytest.fixture
def folder(tmp_path):
    return write_language_model(tmp_path / "model")


def test_a_full_forward_and_the_cache_agree_with_transformers(folder):
    model, plain = language_model(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt, completion = model.prompt_ids("plan a red"), [3, 4, 5, 6]
    ids, count = torch.tensor([[0] * 4 + prompt + completion]), torch.tensor([3])
    expected = plain(input_ids=torch.tensor([prompt + completion])).logits[:, 2:-1]
    torch.testing.assert_close(model.logits(ids, count), expected, rtol=1e-4, atol=1e-5)
    logits, cache = model.begin(ids[:, :7], count)
    for place, token in enumerate(completion):
        torch.testing.assert_close(logits, expected[:, place], rtol=1e-4, atol=1e-5)
        logits = model.go_on(torch.tensor([token]), cache)


def test_a_row_computes_alike_whether_its_batch_has_padding(folder):
    """Transformers drops the mask of a batch without any."""
    model, ids = language_model(folder), torch.randint(1, 14, (4, 20))
    full, mixed = torch.tensor([16, 16, 16, 16]), torch.tensor([16, 16, 16, 3])
    assert torch.equal(model.logits(ids, full)[:3], model.logits(ids, mixed)[:3])
    assert torch.equal(model.begin(ids[:, :16], full)[0][:3], model.begin(ids[:, :16], mixed)[0][:3])


def test_blocks_that_are_computed_again_leave_the_cache_alone(folder):
    plain, again = (language_model(folder, gradient_checkpointing=on) for on in (False, True))
    assert again.network.training
    ids, count = torch.randint(1, 14, (2, 16)), torch.tensor([16, 5])
    for model in (plain, again):
        model.first, cache = model.begin(ids, count)
        model.second = model.go_on(torch.tensor([3, 4]), cache)
    assert torch.equal(plain.first, again.first)
    assert torch.equal(plain.second, again.second)
    assert again.network.training


def test_texts(folder):
    model = language_model(folder)
    assert model.text(model.prompt_ids("plan a red")) == "plan a red"
    assert model.text([2, 3, 0]) == "2 3"
    assert (model.writes("plan 1"), model.writes("<rank>")) == (True, False)
    assert model.token_counts(["plan a red", ""]) == [3, 1]
    assert model.encode([]).tensors["ids"].shape == (0, 20)
    assert model.nothing().tensors["count"].tolist() == [1]


@pytest.mark.parametrize("kind", ["adapters", "merged"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_what_is_written_computes_alike_elsewhere(folder, tmp_path, kind):
    model = language_model(folder)
    for parameter in trained_parameters(model.network).values():
        parameter.data += 0.1
    ids, count = torch.tensor([[11, 13, 14, 3, 4, 5, 6]]), torch.tensor([3])
    expected = model.logits(ids, count).detach()
    tensors = {name: value.detach().clone() for name, value in trained_parameters(model.network).items()}
    if kind == "adapters":
        model.save_lora(tmp_path / "out", tensors)
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "out")
    else:
        model.save_merged(tmp_path / "out", tensors)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert language_model(tmp_path / "out").identity != language_model(folder).identity
    torch.testing.assert_close(plain(input_ids=ids).logits[:, 2:-1], expected, rtol=1e-4, atol=1e-5)


def test_weights_that_are_missing_are_named(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, such as model.norm.weight; get its files again"):
        language_model(folder)


def test_what_is_no_language_model_is_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no language model of transformers"):
        language_model(tmp_path / "empty")
    with pytest.raises(UserError, match="there is no folder"):
        language_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="say how many tokens a call writes at most"):
        CausalLm(ModelConfig(path=str(folder), height=1, width=1, num_frames=1), single_process(), 0)
    with pytest.raises(UserError, match="calls are not split by tokens; leave it out"):
        language_model(folder, world=World(torch.device("cpu"), size=2, context=2))
    with pytest.raises(UserError, match="has no use for it; leave it out"):
        language_model(folder, shift=2.0)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be loaded"):
        language_model(folder)
    other = write_language_model(tmp_path / "other", [*WORDS, "green"])
    (folder / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="belong to different checkpoints"):
        language_model(folder)
    (folder / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(UserError, match=r"the tokenizer of .* could not be loaded"):
        language_model(folder)


def test_qwen3_is_known_by_its_name():
    config = ModelConfig(
        path="Qwen/Qwen3-4B-Instruct-2507", length=8, random_init=True, train=Lora(targets=("q_proj",))
    )
    model = CausalLm(config, World(META), 0)
    frozen = sum(p.numel() for p in model.network.parameters() if not p.requires_grad)
    assert frozen == 4_022_468_096
    assert json.dumps(sorted(model.ends)) == "[151645]"
    assert model.text([1, 2]) == "1 2"
