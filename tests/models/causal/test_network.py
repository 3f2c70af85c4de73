"""diffusers' own transformer, with a dense mask over the whole video, is the judge of what the cached one computes."""

import copy
from collections.abc import Sequence

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flashgrpo.models.causal.network import CausalNetwork
from flashgrpo.models.lora import prepare, trained_parameters
from flashgrpo.models.settings import Lora
from flashgrpo.processes.streaming.cache import Context, KVCache
from flashgrpo.processes.streaming.window import Window

TOKENS = 4  # of a frame of 4 x 4 latents
BLOCKS = 6
EVERYTHING = Window(sink=0, local=3 * BLOCKS)
NARROW = Window(sink=1, local=5)


class Dense(WanAttnProcessor):
    """diffusers' processor with a mask of all frames for self-attention."""

    def __init__(self, frames: torch.Tensor) -> None:
        super().__init__()
        self.mask = frames.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)

    def __call__(self, attn, hidden_states, encoder=None, mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder, self.mask if encoder is None else mask, rotary_emb)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def transformer() -> WanTransformer3DModel:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "freq_dim": 16}
    return WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=8, rope_max_seq_len=64, **sizes).eval()


@pytest.fixture
def blocks() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(2, 4, 3, 4, 4, generator=draw) for _ in range(BLOCKS)]


TEXT = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))


def frames_mask(pasts: Sequence[Sequence[int]]) -> torch.Tensor:
    """(F, F): a frame attends to its block and to the past frames of its block."""
    mask = torch.zeros(3 * len(pasts), 3 * len(pasts), dtype=torch.bool)
    for number, past in enumerate(pasts):
        rows = slice(3 * number, 3 * number + 3)
        mask[rows, list(past)] = True
        mask[rows, rows] = True
    return mask


def streamed(network: CausalNetwork, blocks: list[torch.Tensor], pasts: Sequence[Sequence[int]]) -> torch.Tensor:
    """The velocity of each block at sigma 0, from a cache of those before it."""
    cache, parts = KVCache(), []
    for x, past in zip(blocks, pasts, strict=True):
        context = cache.context(past)
        parts.append(network.velocity(x, 0.0, cache.end, context, TEXT))
        cache = network.commit(cache, x, context, TEXT)
    return torch.cat(parts, dim=2)


@torch.no_grad()
@pytest.mark.parametrize("window", [EVERYTHING, NARROW], ids=["block-causal", "window"])
def test_cached_is_dense(transformer, blocks, window):
    """To the rounding of sums in another order."""
    pasts = [window.past(3 * number) for number in range(BLOCKS)]
    dense = copy.deepcopy(transformer)
    for block in dense.blocks:
        block.attn1.set_processor(Dense(frames_mask(pasts)))
    expected = dense(torch.cat(blocks, dim=2), torch.zeros(2), TEXT, return_dict=False)[0]
    torch.testing.assert_close(streamed(CausalNetwork(transformer), blocks, pasts), expected, rtol=0, atol=2e-6)


@torch.no_grad()
def test_routed_frames_are_those_of_a_mask(transformer, blocks):
    """The last two blocks look at old frames in place of the window's own."""
    pasts = [NARROW.past(3 * number) for number in range(BLOCKS)]
    plain = streamed(CausalNetwork(copy.deepcopy(transformer)), blocks, pasts)
    pasts[4:] = [NARROW.routed(12, (2, 5), nearest=4), NARROW.routed(15, (4, 9), nearest=4)]
    dense = copy.deepcopy(transformer)
    for block in dense.blocks:
        block.attn1.set_processor(Dense(frames_mask(pasts)))
    expected = dense(torch.cat(blocks, dim=2), torch.zeros(2), TEXT, return_dict=False)[0]
    routed = streamed(CausalNetwork(transformer), blocks, pasts)
    torch.testing.assert_close(routed, expected, rtol=0, atol=2e-6)
    assert torch.equal(routed[:, :, :12], plain[:, :, :12])
    assert not torch.equal(routed[:, :, 12:], plain[:, :, 12:])


@torch.no_grad()
def test_without_a_context_it_is_the_network_itself(transformer, blocks):
    expected = transformer(blocks[0], torch.full((2,), 500.0), TEXT, return_dict=False)[0]
    network = CausalNetwork(transformer)
    assert torch.equal(network.velocity(blocks[0], 0.5, 0, None, TEXT), expected)
    assert torch.equal(transformer(blocks[0], torch.full((2,), 500.0), TEXT, return_dict=False)[0], expected)


@torch.no_grad()
def test_one_masked_pass_is_what_the_cache_gives(transformer, blocks):
    """As training computes it: a noise level for each frame, and each block at its own from the clean ones."""
    network = CausalNetwork(transformer)
    window, sigma = NARROW, torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.1])
    cache, parts = KVCache(), []
    for level, x in zip(sigma.tolist(), blocks, strict=True):
        context = cache.context(window.past(cache.end))
        parts.append(network.velocity(x + 1, level, cache.end, context, TEXT))
        cache = network.commit(cache, x, context, TEXT)
    clean, noisy = torch.cat(blocks, dim=2), torch.cat([x + 1 for x in blocks], dim=2)
    mask = frames_mask([window.past(3 * number) for number in range(BLOCKS)])
    past = mask & ~torch.block_diag(*[torch.ones(3, 3, dtype=torch.bool)] * BLOCKS)
    both = torch.cat([torch.cat([mask, torch.zeros_like(mask)], 1), torch.cat([past, mask & ~past], 1)])
    levels = torch.cat([torch.zeros(18), sigma.repeat_interleave(3)]).expand(2, -1)
    v = network.masked(torch.cat([clean, noisy], dim=2), levels, torch.arange(18).repeat(2), both, TEXT)
    torch.testing.assert_close(v[:, :, 18:], torch.cat(parts, dim=2), rtol=0, atol=3e-6)


@torch.no_grad()
def test_a_commit_is_the_call_at_sigma_0(transformer, blocks):
    """What it writes is what any call at level 0 on the same block would; nothing is noised and nothing is drawn."""
    network = CausalNetwork(transformer)
    cache = network.commit(KVCache(), blocks[0], None, TEXT)
    context, state = cache.context((0, 1, 2)), torch.get_rng_state()
    one, two = (network.commit(cache, blocks[1], context, TEXT).blocks[-1] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.frames == range(3, 6)
    pairs = zip((*one.written.keys, *one.written.values), (*two.written.keys, *two.written.values), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    seen = []
    hook = transformer.condition_embedder.timesteps_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network.commit(cache, blocks[1], context, TEXT)
    hook.remove()
    assert torch.equal(seen[0], torch.zeros(2))


def test_commits_have_no_gradient_and_velocities_have_one(transformer, blocks):
    """Of adapters, and the same with the blocks computed again in the backward pass, when other calls were between."""
    prepare(transformer, Lora(rank=2, alpha=4), seed=0)
    for name, parameter in trained_parameters(transformer).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
    network = CausalNetwork(transformer)

    def gradient() -> list[torch.Tensor]:
        cache = network.commit(KVCache(), blocks[0], None, TEXT)
        context = cache.context((0, 1, 2))
        assert not any(key.requires_grad for key in context.keys)
        loss = network.velocity(blocks[1], 0.625, 3, context, TEXT).square().mean()
        network.commit(cache, blocks[2], None, TEXT)
        return list(torch.autograd.grad(loss, list(trained_parameters(transformer).values())))

    plain = gradient()
    assert all(g.abs().sum() > 0 for g in plain)
    transformer.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradient(), strict=True))


@torch.no_grad()
def test_one_row_of_the_past_serves_a_batch_and_rows_may_differ(transformer, blocks):
    network = CausalNetwork(transformer)
    cache, text = KVCache(), TEXT[:1]
    for x in blocks[:4]:
        context = cache.context(EVERYTHING.past(cache.end))
        cache = network.commit(cache, x[:1], context, text)
    one, other = cache.context((0, 4, 11)), cache.context((0, 7, 11))
    x = blocks[4]
    shared = network.velocity(x, 0.5, 12, one, text.expand(2, -1, -1))
    twice = network.velocity(x, 0.5, 12, Context.stack([one, one]), text.expand(2, -1, -1))
    assert torch.equal(shared, twice)
    mixed = network.velocity(x, 0.5, 12, Context.stack([one, other]), text.expand(2, -1, -1))
    assert torch.equal(mixed[0], shared[0])
    assert not torch.equal(mixed[1], shared[1])


@torch.no_grad()
def test_the_cost_of_a_block_does_not_grow_once_the_window_is_full(transformer, blocks):
    """Counted: operations of a velocity, and bytes that are kept."""
    network, cache, window = CausalNetwork(transformer), KVCache(), Window(sink=2, local=6)
    operations, kept = [], []
    for number in range(14):
        past = window.past(cache.end)
        context = cache.context(past)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            network.velocity(blocks[0], 0.5, cache.end, context, TEXT)
        operations.append(counter.get_total_flops())
        cache = network.commit(cache, blocks[number % BLOCKS], context, TEXT)
        cache = cache.only(window.past(cache.end))
        kept.append(cache.nbytes)
    assert operations[0] < operations[1] < operations[2]
    assert len(set(operations[2:])) == 1
    assert len(set(kept[3:])) == 1


def test_a_frame_without_a_position(transformer, blocks):
    network = CausalNetwork(transformer)
    assert network.positions == 64
    with pytest.raises(AssertionError, match="frame 64 has no position"):
        network.velocity(blocks[0], 0.5, 62, None, TEXT)
