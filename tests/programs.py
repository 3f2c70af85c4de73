"""A language model that fits on a page of settings, and a program for it: what tests of programs run on."""

import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from flashgrpo.distributed.world import World, current_device
from flashgrpo.models.causal_lm import CausalLm
from flashgrpo.models.lora import trained_parameters
from flashgrpo.models.settings import Lora, ModelConfig

WORDS = ["<end>", *"123456789", "plan", "draw", "a", "red", "blue"]


def write_language_model(folder: Path, words=WORDS, seed=0, kind="llama", **settings) -> Path:
    """A tiny Llama, or another, of random weights, whose tokens are words."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[0]).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(words), "eos_token_id": 0, "max_position_embeddings": 128}
    config = AutoConfig.for_model(kind, **{**sizes, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def language_model(
    folder: Path, length=4, width=20, world=None, adapters=("default",), begin=None, **settings
) -> CausalLm:
    train = Lora(rank=2, alpha=4, targets=("q_proj", "v_proj", "up_proj", "o_proj"))
    sizes = {"path": str(folder), "length": length, "max_sequence_length": width, "train": train, "adapters": begin}
    config, world = ModelConfig(**{**sizes, **settings}), world or World(current_device())
    return CausalLm(config, world, seed=0, keep_reference=True, adapters=adapters)


def tiny_language_model(**settings) -> CausalLm:
    with tempfile.TemporaryDirectory() as folder:
        return language_model(write_language_model(Path(folder)), **settings)


def set_apart(model: CausalLm) -> None:
    """Move each set of adapters from the identity, each another way."""
    for number, name in enumerate(model.adapters):
        for key, weight in trained_parameters(model.network).items():
            if key.endswith(f".{name}.weight"):
                weight.data += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))


def plan_and_draw(prompt, call, **columns) -> str:
    """A plan, and one to three drawings: as many as the plan has odd digits, and one."""
    plan = call("plan", prompt)
    drawn = [call("draw", f"draw {plan} {number}") for number in range(1 + min(2, sum(map(plan.count, "13579"))))]
    return json.dumps([plan, *drawn])


def halves(text) -> list[int]:
    """Cut a text in its middle."""
    return [0, len(text) // 2]


def broken(text) -> list[int]:
    raise KeyError(text)
