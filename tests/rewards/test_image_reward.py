"""ImageReward on tiny random weights with the released names, against the authors' computation by hand."""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.nn.functional import gelu, layer_norm, linear

from flashgrpo.errors import UserError
from flashgrpo.rewards.image_reward import LENGTH, MEAN, STD, ImageReward
from tools.tiny.architecture import make_tokenizer

WIDTH, HIDDEN, SIDE, PATCH = 64, 128, 32, 16
PROMPTS = ["a red circle moving left slowly", "a blue square"]


def released():
    """Weights of the authors' model in small: an image encoder of one layer, a text encoder of two, the head."""
    shapes = {"blip.visual_encoder.cls_token": (1, 1, WIDTH), "blip.visual_encoder.pos_embed": (1, 5, WIDTH)}
    shapes |= {"blip.visual_encoder.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH)}
    shapes |= {"blip.visual_encoder.patch_embed.proj.bias": (WIDTH,)}

    def add(name, *size):
        shapes.update({f"{name}.weight": size, f"{name}.bias": size[:1]})

    vision = "blip.visual_encoder"
    for name in ("norm", "blocks.0.norm1", "blocks.0.norm2"):
        add(f"{vision}.{name}", WIDTH)
    add(f"{vision}.blocks.0.attn.qkv", 3 * WIDTH, WIDTH)
    add(f"{vision}.blocks.0.attn.proj", WIDTH, WIDTH)
    add(f"{vision}.blocks.0.mlp.fc1", 96, WIDTH)
    add(f"{vision}.blocks.0.mlp.fc2", WIDTH, 96)
    text = "blip.text_encoder"
    shapes[f"{text}.embeddings.word_embeddings.weight"] = (len(make_tokenizer()) + 2, HIDDEN)
    shapes[f"{text}.embeddings.position_embeddings.weight"] = (40, HIDDEN)
    add(f"{text}.embeddings.LayerNorm", HIDDEN)
    for layer in (0, 1):
        own = f"{text}.encoder.layer.{layer}"
        for kind, width in (("attention", HIDDEN), ("crossattention", WIDTH)):
            add(f"{own}.{kind}.self.query", HIDDEN, HIDDEN)
            add(f"{own}.{kind}.self.key", HIDDEN, width)
            add(f"{own}.{kind}.self.value", HIDDEN, width)
            add(f"{own}.{kind}.output.dense", HIDDEN, HIDDEN)
            add(f"{own}.{kind}.output.LayerNorm", HIDDEN)
        add(f"{own}.intermediate.dense", 160, HIDDEN)
        add(f"{own}.output.dense", HIDDEN, 160)
        add(f"{own}.output.LayerNorm", HIDDEN)
    add("blip.vision_proj", 16, WIDTH)
    add("blip.text_proj", 16, HIDDEN)
    for place, size in zip((0, 2, 4, 6, 7), ((32, HIDDEN), (16, 32), (8, 16), (4, 8), (1, 4)), strict=True):
        add(f"mlp.layers.{place}", *size)
    source = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(size, generator=source) * 0.2 for name, size in shapes.items()}
    return tensors | {f"{text}.embeddings.position_ids": torch.arange(40)[None]}


def heads(x, count):
    return x.unflatten(-1, (count, 64)).transpose(1, 2)


def attend(w, name, x, over, bias):
    q, k, v = (
        heads(linear(y, w[f"{name}.self.{part}.weight"], w[f"{name}.self.{part}.bias"]), 2)
        for part, y in (("query", x), ("key", over), ("value", over))
    )
    mixed = ((q @ k.transpose(-1, -2) / 8 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
    out = linear(mixed, w[f"{name}.output.dense.weight"], w[f"{name}.output.dense.bias"])
    return norm(w, f"{name}.output.LayerNorm", out + x, 1e-12)


def norm(w, name, x, eps):
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def by_hand(w, picture, prompt):
    """`ImageReward.score` of the authors: ViT with norms before, BERT that looks at it, five layers, standardised."""
    shorter = min(picture.size)
    size = tuple(int(SIDE * side / shorter) for side in picture.size)
    left, top = ((side - SIDE) // 2 for side in size)
    small = picture.resize(size, Image.BICUBIC).crop((left, top, left + SIDE, top + SIDE))
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3).float() / 255
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    v = {name.removeprefix("blip.visual_encoder."): t for name, t in w.items()}
    x = F.conv2d(
        ((pixels - mean) / std).permute(2, 0, 1)[None], v["patch_embed.proj.weight"], v["patch_embed.proj.bias"], PATCH
    )
    x = torch.cat([v["cls_token"], x.flatten(2).transpose(1, 2)], dim=1) + v["pos_embed"]
    q, k, values = linear(
        norm(v, "blocks.0.norm1", x, 1e-6), v["blocks.0.attn.qkv.weight"], v["blocks.0.attn.qkv.bias"]
    ).chunk(3, -1)
    mixed = (heads(q, 1) @ heads(k, 1).transpose(-1, -2) / 8).softmax(-1) @ heads(values, 1)
    x = x + linear(mixed.transpose(1, 2).flatten(2), v["blocks.0.attn.proj.weight"], v["blocks.0.attn.proj.bias"])
    y = gelu(linear(norm(v, "blocks.0.norm2", x, 1e-6), v["blocks.0.mlp.fc1.weight"], v["blocks.0.mlp.fc1.bias"]))
    seen = norm(v, "norm", x + linear(y, v["blocks.0.mlp.fc2.weight"], v["blocks.0.mlp.fc2.bias"]), 1e-6)
    t = {name.removeprefix("blip.text_encoder."): tensor for name, tensor in w.items()}
    told = make_tokenizer()(prompt, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    z = t["embeddings.word_embeddings.weight"][told.input_ids] + t["embeddings.position_embeddings.weight"][:LENGTH]
    z = norm(t, "embeddings.LayerNorm", z, 1e-12)
    hidden = (1.0 - told.attention_mask[:, None, None].float()) * -10000.0
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        z = attend(t, f"{layer}.attention", z, z, hidden)
        z = attend(t, f"{layer}.crossattention", z, seen, 0.0)
        y = gelu(linear(z, t[f"{layer}.intermediate.dense.weight"], t[f"{layer}.intermediate.dense.bias"]))
        y = linear(y, t[f"{layer}.output.dense.weight"], t[f"{layer}.output.dense.bias"])
        z = norm(t, f"{layer}.output.LayerNorm", y + z, 1e-12)
    score = z[:, 0]
    for place in (0, 2, 4, 6, 7):
        score = linear(score, w[f"mlp.layers.{place}.weight"], w[f"mlp.layers.{place}.bias"])
    return (float(score) - MEAN) / STD


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("image-reward")
    torch.save(released(), path / "ImageReward.pt")
    make_tokenizer().save_pretrained(path / "tokenizer")
    return path


def test_scores_are_those_of_the_authors_computation(folder):
    videos = torch.rand(2, 3, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    scores = ImageReward(str(folder), str(folder / "tokenizer"), frames=2)(videos, PROMPTS)
    expected = []
    for video, prompt in zip(videos, PROMPTS, strict=True):
        pictures = [Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy()) for frame in video[[0, 2]]]
        expected.append(sum(by_hand(released(), picture, prompt) for picture in pictures) / 2)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-3, atol=1e-4)
    assert abs(float(scores[0] - scores[1])) > 1e-3
    file = ImageReward(str(folder / "ImageReward.pt"), str(folder / "tokenizer"), frames=1)
    assert file(videos, [PROMPTS[0] * 40, "a"]).isfinite().all()  # cut at 35 tokens


def test_what_cannot_be_loaded(folder, tmp_path):
    def refused(change, sentence, tokenizer=folder / "tokenizer"):
        torch.save(change(released()), tmp_path / "ImageReward.pt")
        with pytest.raises(UserError, match=sentence):
            ImageReward(str(tmp_path), str(tokenizer))

    lost = "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"
    refused(
        lambda w: {name: t for name, t in w.items() if name != lost}, r"crossattention\.self\.key\.weight is missing"
    )
    refused(lambda w: {}, r"the ImageReward checkpoint .* could not be loaded")
    word = "blip.text_encoder.embeddings.word_embeddings.weight"
    refused(lambda w: w | {word: w[word][:5]}, r"tokenizer .* has \d+ tokens, and ImageReward 5")
    refused(lambda w: w, "the tokenizer .*nothing could not be loaded", tmp_path / "nothing")
