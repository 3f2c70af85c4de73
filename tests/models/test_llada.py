"""LLaDA's checkpoints through transformers' Llama: equal to a plain computation, trained, and written as they were."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.nn.functional import rms_norm, silu
from transformers import PreTrainedTokenizerFast

from flashgrpo.distributed.world import single_process
from flashgrpo.errors import UserError
from flashgrpo.models.llada import LladaModel
from flashgrpo.models.llada_network import Sizes, read_sizes
from flashgrpo.models.lora import trained_parameters
from flashgrpo.models.settings import ModelConfig
from flashgrpo.processes.tokens.masked.process import MaskedProcess
from flashgrpo.processes.tokens.masked.settings import MaskedRollout, MaskedSampling, UnmaskedSteps, Unmasking
from flashgrpo.processes.tokens.model import TokenModel
from flashgrpo.types import Prompt, PromptGroup

WORDS = ["<end>", "<mask>", "<turn>", "a", "b", "c", "d", "sum", "of"]
SIZES = {
    "model_type": "llada",
    "block_type": "llama",
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 24,
    "vocab_size": 12,
    "mask_token_id": 1,
    "eos_token_id": 0,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
}
TEMPLATE = "{% for m in messages %}<turn> {{ m.content }} {% endfor %}<turn>"


class Block(nn.Module):
    def __init__(self, width=16, kv=8, inner=24):
        super().__init__()
        self.attn_norm, self.ff_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        sizes = {"q_proj": (width, width), "k_proj": (width, kv), "v_proj": (width, kv), "attn_out": (width, width)}
        sizes |= {"ff_proj": (width, inner), "up_proj": (width, inner), "ff_out": (inner, width)}
        for name, (wide, out) in sizes.items():
            setattr(self, name, nn.Linear(wide, out, bias=False))


class Plain(nn.Module):
    """LLaDA by its published description, under its own names: attention over everything, rope in halves, SwiGLU."""

    def __init__(self):
        super().__init__()
        parts = {"wte": nn.Embedding(12, 16), "blocks": nn.ModuleList([Block(), Block()])}
        parts |= {"ln_f": nn.RMSNorm(16), "ff_out": nn.Linear(16, 12, bias=False)}
        self.model = nn.Module()
        self.model.transformer = nn.ModuleDict(parts)

    def forward(self, ids):
        parts = self.model.transformer
        x, length = parts["wte"](ids), ids.shape[1]
        angle = torch.arange(length)[:, None] / 5000.0 ** (torch.arange(0, 4, 2) / 4)
        cos, sin = (torch.cat([f(angle)] * 2, dim=1) for f in (torch.cos, torch.sin))

        def turned(vectors):  # (B, heads, L, 4)
            first, second = vectors.chunk(2, dim=-1)
            return vectors * cos + torch.cat([-second, first], dim=-1) * sin

        for block in parts["blocks"]:
            seen = rms_norm(x, (16,), block.attn_norm.weight, 1e-5)
            q, k, v = (
                p(seen).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (block.q_proj, block.k_proj, block.v_proj)
            )
            k, v = (heads.repeat_interleave(2, dim=1) for heads in (turned(k), v))
            weights = (turned(q) @ k.transpose(-1, -2) / 2).softmax(-1)
            x = x + block.attn_out((weights @ v).transpose(1, 2).flatten(2))
            seen = rms_norm(x, (16,), block.ff_norm.weight, 1e-5)
            x = x + block.ff_out(silu(block.ff_proj(seen)) * block.up_proj(seen))
        return parts["ff_out"](rms_norm(x, (16,), parts["ln_f"].weight, 1e-5))


@pytest.fixture(scope="module")
def plain() -> Plain:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Plain()


def write(folder: Path, plain: Plain, words=WORDS, **settings) -> Path:
    """Write a checkpoint as LLaDA's are."""
    folder.mkdir()
    save_file(plain.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**SIZES, **settings}))
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", additional_special_tokens=["<turn>"])
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("llada") / "model", plain)


LORA = {"kind": "lora", "rank": 2, "alpha": 4, "targets": ["q_proj", "o_proj", "gate_proj", "down_proj"]}


def load(folder: Path, train=LORA, **settings) -> LladaModel:
    given = {"path": str(folder), "length": 4, "max_sequence_length": 6, "train": train, **settings}
    config = ModelConfig.model_validate(given)
    return LladaModel(read_sizes(folder), folder, config, single_process(), 0, True)


def logits(model: LladaModel, texts=("sum of a b",), tokens=((4, 1, 1, 5),)):
    condition = model.encode([Prompt(text, {}) for text in texts])
    return model.call(torch.tensor(tokens), condition, lambda hidden, head: head(hidden))


def test_it_is_a_model_of_tokens(folder):
    model = load(folder)
    assert isinstance(model, TokenModel)
    assert (model.vocabulary, model.mask, model.end, model.length) == (12, 1, 0, 4)


def test_it_computes_what_llada_does(folder, plain):
    """Padding on the left changes nothing: prompts of 6 and of 3 tokens in one call, and each by itself."""
    model = load(folder)
    found = logits(model, ("sum of a b", "c"), ((4, 1, 1, 5), (1, 1, 1, 1)))
    for row, ids in enumerate(([2, 7, 8, 3, 4, 2, 4, 1, 1, 5], [2, 5, 2, 1, 1, 1, 1])):
        torch.testing.assert_close(found[row], plain(torch.tensor([ids]))[0, -4:], rtol=1e-4, atol=1e-5)


def test_a_later_token_is_seen(folder):
    model = load(folder)
    one, other = logits(model), logits(model, tokens=((4, 1, 1, 6),))
    assert not torch.isclose(one[0, 0], other[0, 0]).any()


def test_texts_end(folder):
    assert load(folder).decode(torch.tensor([[3, 4, 0, 5], [5, 2, 3, 4]])) == ["a b", "c a b"]


def test_prompts_are_a_turn_of_a_chat(folder):
    model = load(folder)
    assert model.token_counts(["sum of a b", ""]) == [6, 2]
    assert model.nothing().tensors["ids"].tolist() == [[0, 0, 0, 0, 2, 2]]
    with pytest.raises(UserError, match=r"has 7 tokens; raise model.max_sequence_length from 6"):
        model.encode([Prompt("sum of a b c", {})])


@pytest.mark.parametrize("train", [LORA, {"kind": "full"}])
def test_what_was_trained_is_loaded_back(folder, plain, train, tmp_path):
    """Merged by this library and in LLaDA's own names; adapters by peft, onto a network that has those names."""
    model = load(folder, train)
    before = logits(model)
    for parameter in trained_parameters(model.network).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    expected = logits(model).detach()
    assert not torch.isclose(before, expected).all()
    with model.reference():
        torch.testing.assert_close(logits(model), before)
    tensors = {name: value.detach().clone() for name, value in trained_parameters(model.network).items()}
    if train is LORA:
        names = model.save_lora(tmp_path / "lora", tensors)
        assert sorted(file.name for file in (tmp_path / "lora").iterdir()) == sorted(names)
        again = Plain()
        again.load_state_dict(plain.state_dict())
        adapted = PeftModel.from_pretrained(again, tmp_path / "lora")
        found = adapted(torch.tensor([[2, 7, 8, 3, 4, 2, 4, 1, 1, 5]]))[:, -4:]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        begun = load(folder, adapters=str(tmp_path / "lora"))
        torch.testing.assert_close(logits(begun), expected, rtol=1e-4, atol=1e-5)
        assert begun.identity != model.identity
    model.save_merged(tmp_path / "merged", tensors)
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5)
    other = Plain()
    other.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    found = other(torch.tensor([[2, 7, 8, 3, 4, 2, 4, 1, 1, 5]]))[:, -4:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_blocks_are_computed_again(folder):
    """A gradient is the same whether or not, and the blocks are called twice."""
    found = []
    for again in (False, True):
        model, calls = load(folder, gradient_checkpointing=again), []
        model.network.model.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        logits(model).square().sum().backward()
        found.append([parameter.grad for parameter in trained_parameters(model.network).values()])
        assert len(calls) == 1 + again
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_random_weights_need_no_folder():
    config = ModelConfig.model_validate(
        {"path": "GSAI-ML/LLaDA-8B-Instruct", "length": 4, "random_init": True, "train": LORA}
    )
    model = LladaModel(Sizes("tiny", {**SIZES, "n_layers": 1}), None, config, single_process(), 0, False)
    assert logits(model).isfinite().all()
    assert model.decode(torch.tensor([[3, 0, 1, 1]])) == ["3"]


@pytest.mark.parametrize(
    ("settings", "words", "sentence"),
    [
        ({"mask_token_id": 12}, WORDS, "has mask_token_id 12, which its vocabulary of 12 tokens lacks"),
        ({}, [*WORDS, *"efgh"], "has 13 tokens and its network 12; they belong to different checkpoints"),
        ({"include_bias": True}, WORDS, "has include_bias True, which a Llama has not"),
        ({"d_model": None}, WORDS, "says no d_model"),
        ({"model_type": "bert"}, WORDS, "is no LLaDA checkpoint"),
        ({"n_layers": 3}, WORDS, r"model.layers.2.* are missing"),
        ({"n_heads": "4"}, WORDS, r"says no n_heads, which a LLaDA checkpoint does"),
    ],
)
def test_another_checkpoint_is_refused(plain, tmp_path, settings, words, sentence):
    place = write(tmp_path / "model", plain, words, **settings)
    with pytest.raises(UserError, match=sentence):
        load(place)


def test_a_folder_without_weights_is_refused(folder, tmp_path):
    place = tmp_path / "model"
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=r"has no model.safetensors, and no parts of one"):
        load(place)


def test_settings_without_effect_are_refused(folder):
    with pytest.raises(UserError, match=r"model.compile: .* has no use for it"):
        load(folder, compile=True)
    with pytest.raises(UserError, match=r"model.length: say how many tokens a text has"):
        load(folder, length=None, height=1, width=1, num_frames=1)


@pytest.mark.parametrize("again", [False, True])
def test_agrpo_trains_it(folder, again):
    """Drawn, scored again bit for bit with truncation on, and differentiable; texts come out."""
    model = load(folder, gradient_checkpointing=again)
    explore, score = Unmasking(temperature=0.6, top_k=5, top_p=0.9), UnmaskedSteps(2)
    rollout = MaskedRollout(num_steps=2, block=2, micro_batch=3)
    process = MaskedProcess(model, explore, score, rollout, MaskedSampling(), 3, single_process())
    samples = PromptGroup(0, 0, Prompt("sum of a b", {}), 4).samples
    outputs, record = process.draw(samples, 0, lambda rows, tokens: None, 2)
    parts = [(part, *process.replay(part, ())[0]) for part in process.micro_batches(record)]
    assert torch.equal(torch.cat([score for _, score, _ in parts]), record.old)
    parts[0][1].sum().backward()
    assert all(parameter.grad is not None for parameter in trained_parameters(model.network).values())
    assert len(model.decode(outputs)) == 4
