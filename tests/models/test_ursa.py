"""URSA against a plain re-computation of its network and its decoder, on tiny random weights; loading and saving."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from flashgrpo.distributed.world import World, single_process
from flashgrpo.errors import UserError
from flashgrpo.models.load import META
from flashgrpo.models.lora import trained_parameters
from flashgrpo.models.settings import Full, Lora
from flashgrpo.models.ursa.checkpoint import KNOWN, Ursa
from flashgrpo.models.ursa.model import UrsaModel
from flashgrpo.models.ursa.network import ThreeAxisRope, places_of
from flashgrpo.processes.tokens.uniform.model import UniformModel
from flashgrpo.processes.tokens.uniform.settings import Metric, Mixture
from flashgrpo.types import Prompt
from tests.ursa import CODES, PLACES, TEXT, config, write_checkpoint

LORA = Lora(rank=2, alpha=4, targets=("q_proj", "o_proj", "down_proj"))
PROMPT = Prompt("two red", {})


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


def load(folder: Path, **settings) -> UrsaModel:
    keep = settings.pop("keep_reference", False)
    own = config(folder, **{"train": LORA, **settings})
    return UrsaModel(Ursa.of_folder(folder), folder, own, single_process(), 0, keep)


def logits(model: UrsaModel, tokens: torch.Tensor, prompt: Prompt = PROMPT) -> torch.Tensor:
    condition = model.encode([prompt] * len(tokens))
    return model.call(tokens, condition, lambda hidden, head: head(hidden))


TOKENS = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 6, 5, 4, 3, 2]])


# ---- the network


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: torch.Tensor, places: list[tuple[int, int, int]], base: float) -> torch.Tensor:
    """Rotate pairs (i, i + dim / 2) of (L, heads, dim): the i-th by the place on its axis."""
    half = x.shape[-1] // 2
    axes = [0, 1, 2] * (x.shape[-1] // 8) + [1, 2] * half
    out = x.clone()
    for row, place in enumerate(places):
        for i in range(half):
            angle = place[axes[i]] / base ** (2 * i / (2 * half))
            a, b = x[row, :, i], x[row, :, i + half]
            out[row, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[row, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def plain_logits(weights: dict[str, torch.Tensor], text: list[int], codes: list[int]) -> torch.Tensor:
    """URSA's network, one sequence at a time, in words of one syllable."""
    ids = [*text, TEXT - 1, *(TEXT + code for code in codes)]
    grid = [(PLACES + 1, row, column) for row in range(2) for column in range(3)]
    places = [(p, p, p) for p in range(PLACES + 1)] + grid
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(2):
        w = {name.split(".", 3)[3]: t for name, t in weights.items() if name.startswith(f"model.layers.{layer}.")}
        y = normed(x, w["input_layernorm.weight"])
        q, k, v = ((y @ w[f"self_attn.{name}_proj.weight"].T).view(len(ids), -1, 16) for name in "qkv")
        q = turned(normed(q, w["self_attn.q_norm.weight"]), places, 1000.0)
        k = turned(normed(k, w["self_attn.k_norm.weight"]), places, 1000.0)
        shares = [(q[:, head] @ k[:, 0].T / 4).softmax(-1) @ v[:, 0] for head in range(2)]
        x = x + torch.cat(shares, dim=1) @ w["self_attn.o_proj.weight"].T
        y = normed(x, w["post_attention_layernorm.weight"])
        gate = functional.silu(y @ w["mlp.gate_proj.weight"].T)
        x = x + (gate * (y @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    x = normed(x, weights["model.norm.weight"])
    return (x @ weights["lm_head.weight"].T)[PLACES:-1]  # each code is told one place before it


def test_logits_are_those_of_a_plain_computation(folder):
    model = load(folder, train=Full())
    assert isinstance(model, UniformModel)
    weights = {name: tensor.detach() for name, tensor in model.network.state_dict().items()}
    expected = torch.stack([plain_logits(weights, [0, 0, 0, 1, 2], row) for row in TOKENS.tolist()])
    torch.testing.assert_close(logits(model, TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_every_code_sees_all_others_and_the_padding(folder):
    model = load(folder)
    other = TOKENS.clone()
    other[:, -1] = 0
    assert (logits(model, TOKENS) != logits(model, other)).any(dim=2).all()
    assert (logits(model, TOKENS) != logits(model, TOKENS, Prompt("red", {}))).any()


def test_places_and_the_rope_of_text(folder):
    places = places_of(3, 2, 1, 2)[0]
    assert places[:4].tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3]]
    assert places[4:].tolist() == [[4, 0, 0], [4, 0, 1], [5, 0, 0], [5, 0, 1]]
    cos, sin = ThreeAxisRope(16, 1e6)(torch.zeros(1), places[None, :4])
    plain = torch.arange(4)[:, None] / 1e6 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(cos[0], plain.cos().repeat(1, 2))
    torch.testing.assert_close(sin[0], plain.sin().repeat(1, 2))


@pytest.mark.parametrize("train", [LORA, Full()])
def test_blocks_that_are_computed_again_give_the_same_gradient(folder, train):
    found = []
    for again in (False, True):
        model = load(folder, train=train, gradient_checkpointing=again)
        assert model.recomputes is again
        logits(model, TOKENS).square().sum().backward()
        found.append({name: one.grad for name, one in trained_parameters(model.network).items()})
    assert any(gradient.any() for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


# ---- the decoder


def plain_images(w: dict[str, torch.Tensor], codes: torch.Tensor) -> torch.Tensor:
    """IBQ's decoder from its weights alone: one resnet more than its settings say in each block, attention in two."""

    def conv(x, name):
        weight = w[f"{name}.weight"]
        return functional.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(x, name):
        return functional.group_norm(x, 4, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def resnet(x, name):
        y = conv(functional.silu(norm(x, f"{name}.norm1")), f"{name}.conv1")
        y = conv(functional.silu(norm(y, f"{name}.norm2")), f"{name}.conv2")
        return y + (conv(x, f"{name}.conv_shortcut") if f"{name}.conv_shortcut.weight" in w else x)

    def attention(x, name):
        y = norm(x, f"{name}.group_norm").flatten(2).transpose(1, 2)
        q, k, v = (y @ w[f"{name}.to_{one}.weight"].T + w[f"{name}.to_{one}.bias"] for one in "qkv")
        y = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        y = y @ w[f"{name}.to_out.0.weight"].T + w[f"{name}.to_out.0.bias"]
        return x + y.transpose(1, 2).view_as(x)

    x = w["quantizer.embedding.weight"][codes].permute(0, 3, 1, 2)
    x = conv(conv(x, "post_quant_conv"), "decoder.conv_in")
    x = resnet(x, "decoder.mid_block.resnets.0")
    x = attention(x, "decoder.mid_block.attentions.0")
    x = resnet(x, "decoder.mid_block.resnets.1")
    for block in range(2):
        for number in range(2):
            x = resnet(x, f"decoder.up_blocks.{block}.resnets.{number}")
            x = attention(x, f"decoder.up_blocks.{block}.attentions.{number}") if block == 0 else x
        if block == 0:
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), "decoder.up_blocks.0.upsamplers.0.conv")
    return conv(functional.silu(norm(x, "decoder.conv_norm_out")), "decoder.conv_out")


def test_images_are_those_of_a_plain_computation(folder):
    model = load(folder)
    weights = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    images = model.decode(TOKENS)
    assert images.shape == (2, 1, 3, 4, 6)
    expected = (plain_images(weights, TOKENS.view(2, 2, 3)) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert float(images.std()) > 0


# ---- loading


def test_what_a_checkpoint_says_of_its_noise(folder):
    model = load(folder)
    assert (model.path, model.shift, model.mask) == (Metric(0.9, 3.0), 5.0, None)
    assert model.codes.shape == (CODES, 4)
    assert (model.length, model.vocabulary) == (6, CODES)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"alpha": None}))
    assert (load(folder).path, load(folder).shift) == (Mixture(), 1.0)


def test_prompts_are_padded_on_the_left_and_cut_off_on_the_right(folder):
    model = load(folder)
    texts = ["red", "two red cells two red cells two"]
    ids = model.encode([Prompt(text, {}) for text in texts]).tensors["text"]
    assert ids.tolist() == [[0, 0, 0, 0, 2], [1, 2, 3, 1, 2]]
    assert model.nothing().tensors["text"].tolist() == [[0] * PLACES]
    assert model.token_counts(texts) == [1, 7]
    assert model.encode([]).tensors["text"].shape == (0, PLACES)


def test_the_base_is_there_with_adapters_and_with_all_weights_trained(folder):
    for train in (LORA, Full()):
        model = load(folder, train=train, keep_reference=True)
        before = logits(model, TOKENS).detach()
        for parameter in trained_parameters(model.network).values():
            parameter.data += 0.1
        assert not torch.allclose(logits(model, TOKENS), before)
        with model.reference():
            assert torch.equal(logits(model, TOKENS), before)


BROKEN = {
    "vae of other codes": ("vae", {"num_vq_embeddings": 9}, "draws 8 codes and its vae decodes 9; they belong to"),
    "codes without an embedding": (
        "vae",
        {"_quantizer_name": "LFQuantizer"},
        r"AutoencoderVQ \(LFQuantizer\), whose decoder is missing here; known are those of",
    ),
    "tokens that are neither": ("transformer", {"lm_head_size": 9}, "has 20 tokens, which are not 12 of text and 9"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_checkpoint_that_does_not_fit_together_is_refused(folder, case):
    part, change, named = BROKEN[case]
    file = folder / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=named):
        load(folder)


def test_a_tokenizer_of_another_vocabulary_is_refused(folder):
    words = {"<pad>": 0, **{f"word{number}": 1 + number for number in range(TEXT)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer of .* has 13 tokens and its transformer 12 of text"):
        load(folder)


def test_a_file_that_is_missing_or_damaged_gets_one_sentence(folder):
    settings = (folder / "vae" / "config.json").read_text()
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"vae/config\.json cannot be read"):
        load(folder)
    (folder / "vae" / "config.json").write_text(settings)
    codes = folder / "scheduler" / "scheduler_model.pth"
    torch.save({"path.emb": torch.zeros(9, 4)}, codes)
    with pytest.raises(UserError, match="has embeddings of 9 codes and the transformer draws 8"):
        load(folder)
    torch.save({"path.emb": Path("x")}, codes)  # not tensors alone: not run
    with pytest.raises(UserError, match=r"scheduler_model\.pth holds no embeddings of codes"):
        load(folder)
    torch.save({"path.emb": torch.zeros(CODES, 4)}, codes)
    (folder / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"transformer of .* could not be loaded: diffusion_pytorch_model-00002"):
        load(folder)
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match=r"the transformer of .* has no files of weights"):
        load(folder)


@pytest.mark.parametrize(
    ("size", "named"),
    [
        ({"num_frames": 5}, r"model\.num_frames: .* draws images; take 1, not 5"),
        ({"height": 5}, r"model\.height: 5 is no multiple of 2"),
        ({"attention": "flash"}, r"model\.attention: .* has no use for it"),
        ({"shift": 3.0}, r"model\.shift: .* has no use for it"),
    ],
)
def test_a_size_or_a_setting_that_cannot_be_is_refused(folder, size, named):
    with pytest.raises(UserError, match=named):
        load(folder, **size)


def test_known_checkpoints_are_counted_without_weights():
    """512 x 512 pixels are 1,024 codes of 64,000 kinds; 1.7 thousand million weights in the body and the head."""
    own = config("BAAI/URSA-1.7B-IBQ512", height=512, width=512, max_sequence_length=320, random_init=True)
    model = UrsaModel(KNOWN["BAAI/URSA-1.7B-IBQ512"], None, own.model_copy(update={"train": LORA}), World(META), 0)
    assert (model.length, model.vocabulary) == (1024, 64_000)
    layers = sum(
        one.numel() for name, one in model.network.named_parameters() if "layers" in name and "lora" not in name
    )
    assert 1.4e9 < layers < 1.42e9
    assert model.decode(torch.zeros(1, 1024, dtype=torch.int64, device=META)).shape == (1, 1, 3, 512, 512)


# ---- getting the result out


def moved(folder: Path, train) -> tuple[UrsaModel, dict[str, torch.Tensor], torch.Tensor]:
    model = load(folder, train=train)
    torch.manual_seed(1)
    for parameter in trained_parameters(model.network).values():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    tensors = {name: one.detach().clone() for name, one in trained_parameters(model.network).items()}
    return model, tensors, logits(model, TOKENS).detach()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's
def test_adapters_are_what_peft_loads(folder, tmp_path):
    from peft import PeftModel

    model, tensors, expected = moved(folder, LORA)
    assert set(model.save_lora(tmp_path / "lora", tensors)) == {"adapter_model.safetensors", "adapter_config.json"}
    with pytest.raises(UserError, match="comfyui"):
        model.save_lora(tmp_path / "other", tensors, "comfyui")
    base = load(folder, train=Full())
    assert not torch.allclose(logits(base, TOKENS), expected)
    base.network = PeftModel.from_pretrained(base.network, tmp_path / "lora")
    torch.testing.assert_close(logits(base, TOKENS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("train", [LORA, Full()])
def test_a_merged_model_loads_back_with_equal_logits(folder, tmp_path, train):
    model, tensors, expected = moved(folder, train)
    model.save_merged(tmp_path / "merged", tensors)
    again = load(tmp_path / "merged", train=Full())
    torch.testing.assert_close(logits(again, TOKENS), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(again.decode(TOKENS), model.decode(TOKENS))
    assert again.identity != load(folder).identity
