"""What replaces a piece of diffusers' HunyuanVideo-1.5 is the same as that piece."""

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15AttnBlock

from flashgrpo.models.hunyuan_network import masked_at_once


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize(("frames", "places"), [(1, 6), (3, 4), (5, 1)])
def test_a_mask_made_at_once_is_the_one_made_by_rows(frames, places, batch):
    arguments = frames, places, torch.bfloat16, torch.device("cpu"), batch
    expected = HunyuanVideo15AttnBlock.prepare_causal_attention_mask(*arguments)
    block = masked_at_once(HunyuanVideo15AttnBlock(4))
    assert torch.equal(block.prepare_causal_attention_mask(*arguments), expected)
