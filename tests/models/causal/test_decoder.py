"""Decoding in parts gives the frames that decoding all at once gives."""

import pytest
import torch

from flashgrpo.models.causal.decoder import StreamDecoder
from tests.families import wan21, wan22_small


@torch.no_grad()
@pytest.mark.parametrize("build", [wan21, wan22_small], ids=["wan21", "wan22"])
def test_in_parts_is_at_once(build):
    torch.set_num_threads(1)
    vae = build().vae.eval()
    latents = torch.randn(2, 16, 7, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(latents).sample
    decoder = StreamDecoder(vae)
    prefix, state = decoder.decode(latents[:, :, :3])
    assert torch.equal(prefix, whole[:, :, :9])
    first, after = decoder.decode(latents[:, :, 3:6], state)
    assert torch.equal(first, whole[:, :, 9:21])
    assert torch.equal(decoder.decode(latents[:, :, 6:], after)[0], whole[:, :, 21:])
    assert torch.equal(decoder.decode(latents[:, :, 3:6], state)[0], first), "a state serves every branch"


@torch.no_grad()
def test_a_prefix_of_one_video_serves_all_branches():
    torch.set_num_threads(1)
    decoder = StreamDecoder(wan21().vae.eval())
    latents = torch.randn(3, 16, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    latents[:, :, :2] = latents[:1, :, :2]
    _, state = decoder.decode(latents[:1, :, :2])
    branches, _ = decoder.decode(latents[:, :, 2:], state.expanded(3))
    torch.testing.assert_close(branches, decoder.vae.decode(latents).sample[:, :, 5:])
