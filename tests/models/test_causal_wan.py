"""A Wan folder as a streaming model: prompts, blocks, a switch of prompts, memory, decoding, adapters, export."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from flashgrpo.distributed.world import World, single_process
from flashgrpo.errors import UserError
from flashgrpo.models.causal_wan import CausalWan, load_causal_wan
from flashgrpo.models.load import META
from flashgrpo.models.lora import trained_parameters
from flashgrpo.processes.streaming.cache import KVCache
from flashgrpo.processes.streaming.levels import walk_levels
from flashgrpo.processes.streaming.window import Window
from flashgrpo.types import Condition, Prompt
from tests.families import KINDS

KIND = KINDS["wan21"]
FRAMES = 45  # 12 latent frames, 4 blocks
PROMPTS = [Prompt(text, {}) for text in ("a red circle moving left slowly", "a blue square moving up quickly")]
WINDOW = Window(sink=3, local=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "model"
    KIND.build().save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder) -> CausalWan:
    torch.set_num_threads(1)
    return load(folder)


def load(folder: Path, **settings: object) -> CausalWan:
    config = KIND.config(folder, num_frames=FRAMES, **settings)
    return load_causal_wan(config, single_process(), 0, PROMPTS, window=WINDOW)


def noise(model: CausalWan, name: int, rows: int = 1) -> torch.Tensor:
    channels, _, height, width = model.latent_shape
    return torch.randn(rows, channels, 3, height, width, generator=torch.Generator().manual_seed(name))


@torch.no_grad()
def drawn(model: CausalWan, conditions: list[Condition], cache: KVCache | None = None) -> tuple[torch.Tensor, KVCache]:
    """Blocks with these conditions, each from its window."""
    cache, blocks = cache or KVCache(), []
    for condition in conditions:
        start = cache.end
        context = cache.context(model.window.past(start))
        eps = [noise(model, 100 * start + level) for level in range(4)]
        walk = walk_levels(
            lambda x, sigma, start=start, context=context, condition=condition: model.velocity(
                x, sigma, start, context, condition
            ),
            eps[0],
            eps[1:],
            model.levels,
        )
        *_, (_, block) = walk
        cache = model.commit(cache, block, context, condition)
        blocks.append(block)
    return torch.cat(blocks, dim=2), cache


def test_a_video_is_drawn_block_after_block(model):
    assert model.latent_shape == (16, 12, 4, 6)
    assert model.levels == pytest.approx((1.0, 0.9375, 5 / 6, 0.625))
    condition = model.encode(PROMPTS)
    latents, cache = drawn(model, [condition[:1]] * 4)
    assert latents.shape == (1, *model.latent_shape)
    assert latents.isfinite().all()
    assert cache.end == 12


def test_a_switch_is_another_prompt_from_a_frame_on(model):
    """What came before stays; the last frames are read under the new prompt, at the places that they have."""
    first, second = model.encode(PROMPTS[:1]), model.encode(PROMPTS[1:])
    latents, cache = drawn(model, [first] * 3)
    same = model.recache(cache, latents[:, :, 3:], first)
    assert [block.frames for block in same.blocks] == [block.frames for block in cache.blocks]
    assert same.blocks[0] is cache.blocks[0], "what is not written anew is shared"
    equal_keys(same, cache, 0.0)  # their window of 6 reaches back to the first block or to what is written anew
    switched = model.recache(cache, latents[:, :, 3:], second)
    assert not torch.equal(switched.blocks[1].written.keys[-1], cache.blocks[1].written.keys[-1])
    assert not torch.equal(drawn(model, [second], switched)[0], drawn(model, [second], cache)[0])


def equal_keys(one: KVCache, two: KVCache, atol: float) -> None:
    for a, b in zip(one.blocks, two.blocks, strict=True):
        for x, y in zip((*a.written.keys, *a.written.values), (*b.written.keys, *b.written.values), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=atol)


def test_only_the_sink_still_speaks_of_the_old_prompt(model):
    """With a sink of no frames a cache that is written anew is that of the new prompt alone."""
    model.window = Window(sink=0, local=12)
    first, second = model.encode(PROMPTS[:1]), model.encode(PROMPTS[1:])
    latents, cache = drawn(model, [first] * 3)
    switched, other = model.recache(cache, latents, second), KVCache()
    for block in latents.split(3, dim=2):
        other = model.commit(other, block, other.context(model.window.past(other.end)), second)
    equal_keys(switched, other, 0.0)
    with pytest.raises(AssertionError, match="frame 7 is in the middle of a block"):
        model.recache(cache, latents[:, :, 7:], second)


def test_the_memory_of_a_cache_is_known_beforehand(model, folder):
    _, cache = drawn(model, [model.nothing()] * 3)
    assert model.cache_bytes(cache.end) == cache.nbytes
    config = KIND.config(folder, num_frames=FRAMES, random_init=True)
    empty = load_causal_wan(config, World(META), 0, window=WINDOW)
    assert empty.cache_bytes(12) == model.cache_bytes(12)


def test_the_cache_of_self_forcing_by_hand():
    """30 layers, 21 frames of 1560 tokens, 1536 numbers of two bytes, keys and values: 6.0e9; twelve are 3.5e9."""
    sizes = {"path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "height": 480, "width": 832, "num_frames": 81}
    config = KIND.config(Path("none"), **sizes, dtype="bfloat16", random_init=True)
    model = load_causal_wan(config, World(META), 0)
    assert model.cache_bytes(21) == 2 * 30 * 21 * 1560 * 1536 * 2
    assert model.cache_bytes(model.window.frames) == 3_450_470_400


def test_decoding_in_parts(model):
    latents, _ = drawn(model, [model.nothing()] * 2)
    first, state = model.decode(latents[:, :, :3])
    second, _ = model.decode(latents[:, :, 3:], state)
    assert (first.shape[1], second.shape[1]) == (9, 12)
    assert torch.equal(torch.cat([first, second], dim=1), model._wan.decode(latents))


def test_adapters_change_blocks_and_the_reference_does_not_have_them(model):
    condition, x = model.encode(PROMPTS[:1]), noise(model, 0)
    for name, parameter in trained_parameters(model.network).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        tuned = model.velocity(x, 1.0, 0, None, condition)
        with model.reference():
            base = model.velocity(x, 1.0, 0, None, condition)
    assert not torch.equal(tuned, base)


def test_what_is_exported_is_wan(model, folder, tmp_path):
    """The pipeline of diffusers computes the first block's velocity, with the adapters loaded or merged."""
    for name, parameter in trained_parameters(model.network).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(3))
    tensors = {name: parameter.detach().clone() for name, parameter in trained_parameters(model.network).items()}
    condition, x = model.encode(PROMPTS[:1]), noise(model, 0)
    with torch.no_grad():
        expected = model.velocity(x, 1.0, 0, None, condition)
    model.save_lora(tmp_path / "lora", tensors)
    model.save_merged(tmp_path / "merged", tensors)
    loaded = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    loaded.load_lora_weights(tmp_path / "lora")
    for pipeline in (loaded, WanPipeline.from_pretrained(tmp_path / "merged", dtype=torch.float32)):
        with torch.no_grad():
            v = pipeline.transformer(x, torch.full((1,), 1000.0), condition.tensors["text"], return_dict=False)[0]
        torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-4)


def test_identity_tells_generators_apart(folder, tmp_path):
    plain = load(folder).identity
    assert plain == load(folder).identity
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    others = [CausalWan(load(folder)._wan, WINDOW, tmp_path / name).identity for name in ("a", "b")]
    assert len({plain, *others}) == 3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"compile": True}, "model.compile: a streaming model has no use for it"),
        ({"vae_tiling": True}, "model.vae_tiling: a streaming model has no use for it"),
        ({"num_frames": 41}, "41 are 11 latent frames, no whole blocks of 3; the nearest that fits is 45"),
    ],
)
def test_settings_that_do_not_stream(folder, settings, sentence):
    config = KIND.config(folder, **{"num_frames": FRAMES, **settings})
    with pytest.raises(UserError, match=sentence):
        load_causal_wan(config, single_process(), 0)


@pytest.mark.parametrize("name", ["wan22-a14b", "wan22-5b", "wan21-image", "ltx"])
def test_models_that_do_not_stream(name, tmp_path):
    KINDS[name].build().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="does not stream; Wan text-to-video with one transformer does"):
        load_causal_wan(KINDS[name].config(tmp_path / "model"), single_process(), 0)


def test_blocks_are_not_split_over_processes(folder):
    world = replace(single_process(), context=2)
    with pytest.raises(UserError, match=r"parallel.context: a streaming model's blocks are too short to be split"):
        load_causal_wan(KIND.config(folder, num_frames=FRAMES), world, 0)
