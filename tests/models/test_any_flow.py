"""AnyFlow-FAR's folder as a streaming model; diffusers' own pipeline is the judge of the videos that it draws."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AnyFlowFARPipeline

from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import World, single_process
from flashgrpo.errors import UserError
from flashgrpo.kinds.streaming import make_process, planned_cost
from flashgrpo.models.causal_wan import load_causal_wan
from flashgrpo.models.load import META, load_model
from flashgrpo.models.lora import trained_parameters
from flashgrpo.processes.streaming.cache import KVCache
from flashgrpo.processes.streaming.drawing import block_noise
from flashgrpo.processes.streaming.process import StreamingProcess, evaluation_name
from flashgrpo.processes.streaming.window import Window
from flashgrpo.types import Prompt, PromptGroup
from tests.fakes import whole_score
from tests.families import ANY_FLOW

PARTITION = [1, 3, 3, 3, 3, 3]
PROMPTS = [Prompt(text, {}) for text in ("a red circle moving left slowly", "a blue square moving up quickly")]
NAMES = [(0, "one"), (0, "two")]
SETTINGS = [
    *("model.height=32", "model.width=64", "model.num_frames=61", "model.max_sequence_length=12"),
    "algorithm.explore={blocks: 1, routed: 1, nearest: 9, reach: 18, earliest: 12}",
    *("rollout.first_block=1", "rollout.sink=1", "rollout.local=16", "rollout.group_size=3", "rollout.micro_batch=3"),
    *("rollout.prompts=1", "optim.micro_batch=3"),
]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("far") / "model"
    ANY_FLOW.build().save_pretrained(folder)
    return folder


def config_of(folder: Path, *overrides: str) -> RunConfig:
    return RunConfig.load("tiny-streaming", [f"model.path={folder}", *SETTINGS, *overrides])


def process_of(folder: Path, *overrides: str) -> StreamingProcess:
    return make_process(config_of(folder, *overrides), single_process(), PROMPTS)


@pytest.fixture
def process(folder) -> StreamingProcess:
    return process_of(folder)


def noise_of(process: StreamingProcess, name: tuple) -> torch.Tensor:
    """The noise of a whole video, (1, C, F, H, W)."""
    starts = process.model.window.starts(16)
    return torch.cat([block_noise(process.model, [evaluation_name(name)], frame, 0) for frame in starts], dim=2)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_it_draws_what_diffusers_draws(folder, process):
    """From the same noise: its own loop, mask, cache, scheduler and text encoder."""
    assert process.model.levels == pytest.approx((1.0, 0.9, 0.75, 0.5))  # the checkpoint's shift is 3
    pipeline = AnyFlowFARPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    drawn = process.sample(PROMPTS, NAMES, lambda rows, outputs: None)
    for row, (prompt, name) in enumerate(zip(PROMPTS, NAMES, strict=True)):
        size = {"height": 32, "width": 64, "num_frames": 61, "num_inference_steps": 4, "max_sequence_length": 12}
        how = {"chunk_partition": PARTITION, "output_type": "latent", "return_dict": False}
        (expected,) = pipeline(prompt.text, latents=noise_of(process, name), **size, **how)
        torch.testing.assert_close(drawn[row : row + 1], expected, rtol=0, atol=1e-5)


def test_blocks_and_whole_videos_are_the_same(process):
    """The first block is one frame, and is handed out with the second."""
    whole = process.media(process.sample(PROMPTS[:1], NAMES[:1], lambda rows, outputs: None))[0]
    parts = list(process.stream(PROMPTS[0], NAMES[0]))
    assert [len(part) for part in parts] == [13, 12, 12, 12, 12]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_branches_part_at_the_fork_and_have_scores_with_a_gradient(process):
    samples = PromptGroup(0, 0, PROMPTS[0], 3, anchored=True).samples
    outputs, record = process.draw(samples, 7, lambda rows, outputs: None, 2)
    fork = int(record.slot[0])
    assert fork == 13
    assert torch.equal(outputs[:, :, :fork], outputs[:1, :, :fork].expand(4, -1, -1, -1, -1))
    assert len({tuple(video.tolist()) for video in outputs[:, :, fork:].flatten(1)}) == 4
    assert bool((record.old < 0).all())
    again = whole_score(process, record)
    assert torch.equal(again.detach(), record.old)
    weights = [weight for name, weight in trained_parameters(process.network).items() if "lora_B" in name]
    plain = torch.autograd.grad(again.sum(), weights)
    assert all(bool(grad.abs().sum() > 0) for grad in plain)
    process.network.enable_gradient_checkpointing()
    computed_again = torch.autograd.grad(whole_score(process, record).sum(), weights)
    assert all(torch.equal(one, other) for one, other in zip(plain, computed_again, strict=True))


def test_a_branch_in_the_clean_context_has_the_score_zero(folder):
    """Exactly, over two blocks: the cache is written again behind the first as it is in a replay."""
    process = process_of(folder, "model.num_frames=73", "algorithm.explore.blocks=2")
    samples = PromptGroup(0, 0, PROMPTS[0], 3, anchored=True).samples
    _, routed = process.draw(samples, 7, lambda rows, outputs: None, 2)
    assert bool((routed.old < 0).all())
    forks = process.source.forks
    process.source.forks = lambda script: [(13, 0)]
    assert forks(process.script(PROMPTS[0])) == process.source.forks(None)
    process.source.routing = replace(process.source.routing, nearest=16)
    process.source.routes = lambda fork, samples: [[] for _ in samples]
    _, record = process.draw(samples, 7, lambda rows, outputs: None, 2)
    assert torch.equal(record.old, torch.zeros(3))


@torch.no_grad()
def test_a_switch_is_another_prompt_from_a_frame_on(process):
    """The same prompt changes nothing; the switch falls on a block of three behind one of one frame."""
    same = Prompt(PROMPTS[0].text, {"switches": [{"frame": 25, "prompt": PROMPTS[0].text}]})
    other = Prompt(PROMPTS[0].text, {"switches": [{"frame": 25, "prompt": PROMPTS[1].text}]})
    plain, unchanged, switched = (
        process.sample([prompt], NAMES[:1], lambda rows, outputs: None)[0] for prompt in (PROMPTS[0], same, other)
    )
    torch.testing.assert_close(unchanged, plain, rtol=0, atol=1e-5)
    assert torch.equal(switched[:, :7], plain[:, :7])
    assert not torch.allclose(switched[:, 7:], plain[:, 7:])
    wrong = Prompt("a", {"switches": [{"frame": 24, "prompt": "b"}]})
    with pytest.raises(UserError, match="not at frame 24; the nearest is 25"):
        process.sample([wrong], NAMES[:1], lambda rows, outputs: None)


@torch.no_grad()
def test_the_memory_of_a_cache_is_known_beforehand(process, folder):
    """Two blocks in full, with their latents; older ones in patches of four times the size."""
    model, cache = process.model, KVCache()
    condition = model.nothing()
    for start in model.window.starts(16):
        x = torch.ones(1, 16, model.window.size(start), 4, 8)
        cache = model.commit(cache, x, cache.context(range(cache.end)), condition)
        assert model.cache_bytes(cache.end) == cache.nbytes
    assert [block.latents is not None for block in cache.blocks] == [False] * 4 + [True] * 2
    keys = [key for block in cache.blocks for key in block.written.keys]
    assert all(key.untyped_storage().nbytes() == key.nbytes for key in keys), "and nothing else is held"
    assert [block.written.keys[0].shape[1] for block in cache.blocks] == [2, 6, 6, 6, 24, 24]
    empty = load_causal_wan(config_of(folder).model.weightless(), World(META), 0, window=model.window)
    assert empty.cache_bytes(16) == cache.nbytes


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_is_exported_is_any_flow(folder, process, tmp_path):
    model = process.model
    for name, parameter in trained_parameters(model.network).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(3))
    tensors = {name: parameter.detach().clone() for name, parameter in trained_parameters(model.network).items()}
    x, condition = torch.ones(1, 16, 1, 4, 8), model.encode(PROMPTS[:1])
    with torch.no_grad():
        expected = model.velocity(x, 1.0, 0, None, condition)
        with model.reference():
            assert not torch.allclose(model.velocity(x, 1.0, 0, None, condition), expected)
    model.save_lora(tmp_path / "lora", tensors)
    model.save_merged(tmp_path / "merged", tensors)
    loaded = AnyFlowFARPipeline.from_pretrained(folder, dtype=torch.float32)
    loaded.load_lora_weights(tmp_path / "lora")
    for pipeline in (loaded, AnyFlowFARPipeline.from_pretrained(tmp_path / "merged", dtype=torch.float32)):
        v = by_diffusers(pipeline.transformer, x, condition.tensors["text"], 1000 * model.levels[1])
        torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def by_diffusers(transformer, x: torch.Tensor, text: torch.Tensor, r: float) -> torch.Tensor:
    """The velocity of a first frame, from level 1 to r."""
    flag, empty = {"num_cached_chunks": 0, "is_cache_step": False}, torch.zeros(2, 1, 2, 0, 16)
    cache = [{"full_cache": empty, "compressed_cache": empty}] * len(transformer.blocks)
    times = torch.full((1, 1), 1000.0), torch.full((1, 1), r)
    found = transformer(x.transpose(1, 2), *times, text, [1], kv_cache=cache, kv_cache_flag=flag)
    return found.sample.transpose(1, 2)


REFUSED = [
    (["algorithm=flash-stream"], "without noise between its levels, so one-level has nothing to draw"),
    (["algorithm=stream-nft"], "without noise between its levels"),
    (["algorithm.explore.nearest=6"], "looks at its last 6 frames in full and .* with the block's own 9 or more"),
    (["rollout.first_block=0"], "1 latent frame and then 3 at a time; set rollout.first_block=1 rollout.block=3"),
    (
        ["rollout.local=8", "algorithm.explore.nearest=8"],
        "its last frames in full, with the block's own 9; the window",
    ),
    (["model.shift=2"], "model.shift: .* at the levels of its own scheduler; leave it out"),
    (["model.generator=some.pt"], "has a generator of its own"),
    (["model.num_frames=65"], "17 latent frames, no whole blocks of 3 behind one of 1; the nearest that fits is 61"),
]


@pytest.mark.parametrize(("overrides", "sentence"), REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence(folder, overrides, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        process_of(folder, *overrides)
    assert "\n" not in str(error.value)
    if "generator" not in overrides[0]:
        with pytest.raises(UserError, match=sentence):
            planned_cost(config_of(folder, *overrides), 0)


@pytest.mark.parametrize("blocks", [[16], [4, 3, 3], [1, 3, 2, 3]])
def test_blocks_that_are_not_alike_are_refused(folder, blocks, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model/transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chunk_partition": blocks}))
    with pytest.raises(UserError, match="a short first one and then equal ones are supported"):
        process_of(tmp_path / "model")


def test_what_writes_the_cache_is_not_trained(folder):
    """It gets no gradient, and weight decay would shrink it."""
    process = process_of(folder, "model.train={kind: full}")
    assert not [name for name in trained_parameters(process.network) if "far_patch_embedding" in name]


@torch.no_grad()
def test_rows_that_see_other_frames_are_written_as_each_alone(process):
    model, cache = process.model, KVCache()
    condition, draw = model.encode(PROMPTS), torch.Generator().manual_seed(0)
    for start in model.window.starts(16):
        x = torch.randn(1, 16, model.window.size(start), 4, 8, generator=draw)
        cache = model.commit(cache, x, cache.context(range(cache.end)), condition[:1])
    routes = [(0, 1, 2, *range(10, 16)), (0, 4, 6, *range(10, 16))]
    x = torch.randn(2, 16, 3, 4, 8, generator=draw)
    both = model.commit(cache, x, cache.contexts(routes), condition)
    for row, route in enumerate(routes):
        alone = model.commit(cache, x[row : row + 1], cache.context(route), condition[row : row + 1])
        for one, other in zip(both.row(row).blocks, alone.blocks, strict=True):
            pairs = zip(one.written.keys + one.written.values, other.written.keys + other.written.values, strict=True)
            assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in pairs)


@torch.no_grad()
def test_a_switch_behind_the_window(folder):
    """Frames that are written anew have older ones before them, which stay in large patches."""
    size = ["model.num_frames=97", "rollout.local=9", "algorithm.explore.earliest=16"]
    process = process_of(folder, *size)
    same = Prompt(PROMPTS[0].text, {"switches": [{"frame": 73, "prompt": PROMPTS[0].text}]})
    other = Prompt(PROMPTS[0].text, {"switches": [{"frame": 73, "prompt": PROMPTS[1].text}]})
    plain, unchanged, switched = (
        process.sample([prompt], NAMES[:1], lambda rows, outputs: None)[0] for prompt in (PROMPTS[0], same, other)
    )
    assert process.model.window.recent(19) == 10
    assert torch.equal(unchanged[:, :19], plain[:, :19])
    assert torch.equal(switched[:, :19], plain[:, :19])
    assert not torch.allclose(switched[:, 19:], unchanged[:, 19:])


def test_half_the_digits_are_enough(folder):
    """In bfloat16 it draws and scores; the un-routed score stays exact."""
    process = process_of(folder, "model.dtype=bfloat16")
    samples = PromptGroup(0, 0, PROMPTS[0], 3, anchored=True).samples
    _, record = process.draw(samples, 7, lambda rows, outputs: None, 2)
    assert torch.equal(whole_score(process, record).detach(), record.old)


def test_an_algorithm_of_whole_videos_does_not_take_it(folder):
    with pytest.raises(UserError, match="draws a video block by block; take an algorithm for that, such as kvpo"):
        load_model(ANY_FLOW.config(folder), single_process(), 0)


def test_the_published_sizes_are_known():
    """Keys and values of six frames of 1560 tokens and of 16 of 390, in 30 layers of 1536 numbers of two bytes."""
    sizes = {"path": "nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers", "height": 480, "width": 832, "num_frames": 85}
    config = ANY_FLOW.config(Path("none"), **sizes, dtype="bfloat16", random_init=True)
    model = load_causal_wan(config, World(META), 0, window=Window(1, 22, 3, 1))
    latents = 6 * 16 * 60 * 104 * 4
    assert model.cache_bytes(22) == 2 * 30 * (6 * 1560 + 16 * 390) * 1536 * 2 + latents
    assert model.levels == pytest.approx((1.0, 0.9375, 5 / 6, 0.625))
