"""The bundled pipeline: what is shipped, and the recipe that makes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from flashgrpo.rewards.shapes import ATTRIBUTES, agreement, persistence
from tools.tiny import build, world
from tools.tiny.architecture import TEXT_LENGTH, make_tokenizer
from tools.tiny.muon import orthogonalize


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def load(folder: Path) -> WanPipeline:
    pipe = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def shipped() -> WanPipeline:
    return load(build.WEIGHTS)


def generate(pipe: WanPipeline, prompts: list[str], steps: int = 4) -> torch.Tensor:
    """(B, F, 3, H, W) through ``WanPipeline.__call__``."""
    return pipe(
        prompts,
        height=48,
        width=48,
        num_frames=9,
        max_sequence_length=TEXT_LENGTH,
        num_inference_steps=steps,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames


def test_shipped_pipeline_is_small_and_half_precision() -> None:
    files = [path for path in build.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10e6
    assert all(path.suffix in {".json", ".safetensors"} for path in files)


def test_shipped_pipeline_generates_by_itself(shipped: WanPipeline) -> None:
    assert (shipped.vae_scale_factor_spatial, shipped.vae_scale_factor_temporal) == (8, 4)
    frames = generate(shipped, ["a red circle moving left slowly"])
    assert frames.shape == (1, 9, 3, 48, 48)
    assert torch.isfinite(frames).all()


def test_base_looks_right_and_follows_its_prompt_imperfectly(shipped: WanPipeline) -> None:
    prompts = [world.caption(c) for c in world.heldout_combinations()]
    frames = generate(shipped, prompts, steps=10)
    score = torch.stack(list(agreement(frames, prompts).values())).mean().item()
    assert 0.4 < score < 0.75
    assert persistence(frames, prompts).mean() > 0.8


def test_autoencoder_keeps_what_the_reward_reads(shipped: WanPipeline) -> None:
    some = world.heldout_combinations()[::3]
    clips = world.render(some, torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = shipped.vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mean
        decoded = (shipped.vae.decode(latents).sample.transpose(1, 2) + 1) / 2
    score = torch.stack(list(agreement(decoded, [world.caption(c) for c in some]).values())).mean().item()
    assert score > 0.9


def test_empty_prompt_is_one_token_and_every_word_is_known() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]
    ids = [i for c in world.all_combinations() for i in tokenizer(world.caption(c)).input_ids]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer("a chartreuse circle").input_ids[1] == tokenizer.unk_token_id


def test_caption_confusion_by_hand() -> None:
    """Share 0 keeps every caption; share 1 forgets the clip; in between an attribute survives 1 - share + share / n."""
    combinations = world.all_combinations()
    assert torch.equal(build.caption_confusion(combinations, 0.0), torch.eye(144))
    torch.testing.assert_close(build.caption_confusion(combinations, 1.0), torch.full((144, 144), 1 / 144))
    confusion = build.caption_confusion(combinations, 0.6)
    for name, known in ATTRIBUTES.items():
        same = torch.tensor([getattr(c, name) == getattr(combinations[0], name) for c in combinations])
        assert confusion[0, same].sum().item() == pytest.approx(0.4 + 0.6 / len(known), abs=1e-5)


def test_muon_orthogonalizes() -> None:
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_quick_build_makes_a_loadable_pipeline_twice_the_same(tmp_path: Path) -> None:
    recipe = build.QUICK
    build.build(tmp_path / "one", seed=1, recipe=recipe)
    build.build(tmp_path / "two", seed=1, recipe=recipe)
    for path in sorted((tmp_path / "one").rglob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    assert generate(load(tmp_path / "one"), ["a blue square moving up quickly"]).shape == (1, 9, 3, 48, 48)
