"""diffusers' own AnyFlow-FAR, by flex attention and its own cache, is the judge of what the cached one computes."""

import copy

import pytest
import torch
from diffusers import AnyFlowFARTransformer3DModel

from flashgrpo.models.causal.flow_map import FarNetwork
from flashgrpo.processes.streaming.cache import KVCache

LEVELS = (1.0, 0.9375, 5 / 6, 0.625)
PARTITION = [1, 3, 3, 3, 3]
SIDE = 8


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def transformer() -> AnyFlowFARTransformer3DModel:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "num_layers": 2, "freq_dim": 16}
    made = AnyFlowFARTransformer3DModel(in_channels=4, out_channels=4, text_dim=8, rope_max_seq_len=64, **sizes).eval()
    torch.nn.init.normal_(made.far_patch_embedding.weight, std=0.3)
    return made


TEXT = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))


def noise() -> torch.Tensor:
    return torch.randn(2, sum(PARTITION), 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def by_diffusers(network: AnyFlowFARTransformer3DModel) -> torch.Tensor:
    """Latents (B, F, C, H, W), as the pipeline draws them: its loop over chunks, levels and cache steps."""
    x, layers, tokens = noise(), network.config.num_layers, (SIDE // 2) ** 2
    shape = (2, 2, 2, 3 * 3 * tokens, 16)
    cache = [{"full_cache": torch.zeros(shape), "compressed_cache": torch.zeros(shape)} for _ in range(layers)]
    flag, done, drawn = {"num_cached_chunks": 0, "is_cache_step": False}, 0, []
    for number, size in enumerate(PARTITION):
        z, partition = x[:, done : done + size], PARTITION[: number + 1]
        for t, r in zip(LEVELS, (*LEVELS[1:], 0.0), strict=True):
            times = [torch.full((2, size), 1000 * level) for level in (t, r)]
            call = {"chunk_partition": partition, "kv_cache": cache, "return_dict": False}
            z = z - (t - r) * network(z, *times, TEXT, kv_cache_flag=copy.deepcopy(flag), **call)[0]
        drawn.append(z)
        done += size
        finished, at_zero = torch.cat(drawn, dim=1), torch.zeros(2, done)
        writing = {**flag, "is_cache_step": True}
        network(finished, at_zero, at_zero, TEXT, kv_cache_flag=writing, **call)
        flag["num_cached_chunks"] += 1
    return torch.cat(drawn, dim=1)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_cached_is_diffusers_own(transformer):
    expected = by_diffusers(copy.deepcopy(transformer))
    network, cache, drawn = FarNetwork(transformer, LEVELS), KVCache(), []
    for z in noise().transpose(1, 2).split(PARTITION, dim=2):
        context = cache.context(tuple(range(cache.end)))
        for t, r in zip(LEVELS, (*LEVELS[1:], 0.0), strict=True):
            z = z - (t - r) * network.velocity(z, t, cache.end, context, TEXT)
        cache = network.commit(cache, z, context, TEXT)
        drawn.append(z)
    torch.testing.assert_close(torch.cat(drawn, dim=2).transpose(1, 2), expected, rtol=0, atol=1e-5)
