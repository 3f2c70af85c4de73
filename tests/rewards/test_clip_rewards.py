"""CLIP's rewards on a tiny random network of the same architecture, against the model called by hand."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from flashgrpo.errors import UserError
from flashgrpo.rewards.clip import Aesthetic, ClipScore, PickScore
from tools.tiny.architecture import make_tokenizer

PROMPTS = ["a red circle moving left slowly", "a blue square"]


def make_clip(path) -> str:
    """Write a tiny random CLIP with its processor; returns the folder."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(make_tokenizer()), "max_position_embeddings": 77, "eos_token_id": 1}
    vision = {**small, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, make_tokenizer()).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def videos():
    return torch.rand(2, 5, 3, 40, 56, generator=torch.Generator().manual_seed(0))


def by_hand(folder, videos) -> tuple[torch.Tensor, float]:
    """Cosines (B, 2) of the first and the last frame with the prompts, through pictures of PIL, one call each."""
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    cosines = []
    with torch.no_grad():
        for video, prompt in zip(videos, PROMPTS, strict=True):
            for frame in video[[0, -1]]:
                picture = Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy())
                out = model(**processor(text=[prompt], images=[picture], return_tensors="pt"))
                cosines.append(float(out.logits_per_image / model.logit_scale.exp()))
        return torch.tensor(cosines).view(2, 2), float(model.logit_scale.exp())


def test_scores_are_those_of_the_model_itself(folder, videos):
    cosines, scale = by_hand(folder, videos)
    reward = ClipScore(path=folder, frames=2)
    scores = reward(videos, PROMPTS)
    torch.testing.assert_close(scores, cosines.mean(dim=1), rtol=1e-4, atol=1e-5)
    picked = PickScore(path=folder, processor=folder, frames=2)(videos, PROMPTS)
    torch.testing.assert_close(picked, scale * cosines.mean(dim=1), rtol=1e-4, atol=1e-4)
    assert torch.equal(scores, reward(videos, PROMPTS))
    assert reward(videos, [PROMPTS[0] * 40, "a"]).isfinite().all()  # cut at 77 tokens


def test_the_aesthetic_head_is_applied_in_its_order(folder, videos, tmp_path):
    source = torch.Generator().manual_seed(1)
    shapes = {"layers.0": (6, 12), "layers.2": (3, 6), "layers.10": (1, 3)}
    weights = {f"{name}.weight": torch.randn(shape, generator=source) for name, shape in shapes.items()}
    biases = {f"{name}.bias": torch.randn(shape[0], generator=source) for name, shape in shapes.items()}
    save_file({**weights, **biases}, tmp_path / "head.safetensors")
    scores = Aesthetic(head=str(tmp_path / "head.safetensors"), path=folder)(videos, PROMPTS)
    (a, b, c), (d, e, f) = weights.values(), biases.values()
    whole, offset = c @ b @ a, c @ (b @ d + e) + f  # layers without activations are one
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    frames = (videos[0, [0, 1, 3, 4]] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        features = model.get_image_features(**processor(images=list(frames), return_tensors="pt"))
        features = getattr(features, "pooler_output", features)
        expected = torch.nn.functional.normalize(features, dim=-1) @ whole.T + offset
    torch.testing.assert_close(scores[0], expected.mean(), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_loaded(folder, videos, tmp_path):
    with pytest.raises(UserError, match=r"CLIP model .*nothing could not be loaded"):
        ClipScore(path=str(tmp_path / "nothing"))
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"aesthetic head .*bad.safetensors could not be read"):
        Aesthetic(head=str(tmp_path / "bad.safetensors"), path=folder)(videos, PROMPTS)
    save_file({"linear.weight": torch.zeros(1, 5), "linear.bias": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"takes embeddings of width 5, and .* gives 12"):
        Aesthetic(head=str(tmp_path / "other.safetensors"), path=folder)(videos, PROMPTS)
