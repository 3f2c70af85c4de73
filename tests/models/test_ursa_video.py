"""The decoder of URSA's videos against a plain re-computation from its weights, on tiny random ones."""

import math

import pytest
import torch
from torch.nn import functional

from flashgrpo.distributed.world import World, single_process
from flashgrpo.errors import UserError
from flashgrpo.models.load import META
from flashgrpo.models.load_tokens import load_token_model
from flashgrpo.models.settings import Full
from flashgrpo.models.ursa.checkpoint import KNOWN, Ursa
from flashgrpo.models.ursa.model import UrsaModel
from flashgrpo.models.ursa.video import DEFAULTS, LEVELS, CosmosDecoder
from tests.ursa import TRANSFORMER, config

TINY = {**DEFAULTS, "block_out_channels": (8, 16, 24, 24), "layers_per_block": 1, "latent_channels": 4}


def decoder(settings=TINY, levels=LEVELS) -> CosmosDecoder:
    torch.manual_seed(0)
    made = CosmosDecoder(settings, levels)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return made.requires_grad_(False)


def test_a_code_is_a_digit_of_each_dimension():
    """The first digit is the fastest; digits of 8 levels lie from -1 to 0.75, those of 5 from -1 to 1."""
    assert math.prod(LEVELS) == DEFAULTS["num_vq_embeddings"]
    found = decoder().latents(torch.tensor([0, 7, 8, 63_999]).view(1, 1, 1, 4))[0, :, 0, 0].T
    expected = [[-1] * 6, [0.75, *[-1] * 5], [-1, -0.75, *[-1] * 4], [0.75] * 3 + [1] * 3]
    torch.testing.assert_close(found, torch.tensor(expected))


def plain_videos(w: dict[str, torch.Tensor], x: torch.Tensor, upsampled: dict[int, tuple[bool, bool]]) -> torch.Tensor:
    """Decode latents (B, C, F, h, w); `upsampled` says of each block whether space and time grow."""

    def conv(x, name):
        weight = w[f"{name}.weight"]
        before = weight.shape[2] - 1
        x = torch.cat([x[:, :, :1]] * before + [x], dim=2)
        sides = [size // 2 for size in weight.shape[3:]]
        return functional.conv3d(x, weight, w[f"{name}.bias"], padding=(0, *sides))

    def both(x, name):
        return conv(conv(x, f"{name}.0"), f"{name}.1")

    def norm(x, name):
        mean, var = x.mean((1, 3, 4), keepdim=True), x.var((1, 3, 4), keepdim=True, correction=0)
        scale, shift = (w[f"{name}.{kind}"].view(1, -1, 1, 1, 1) for kind in ("weight", "bias"))
        return (x - mean) / (var + 1e-6).sqrt() * scale + shift

    def resnet(x, name):
        y = both(functional.silu(norm(x, f"{name}.norm1")), f"{name}.conv1")
        y = both(functional.silu(norm(y, f"{name}.norm2")), f"{name}.conv2")
        return y + (conv(x, f"{name}.conv_shortcut") if f"{name}.conv_shortcut.weight" in w else x)

    def attention(x, name, over_time):
        y = norm(x, f"{name}.group_norm").movedim(1, -1)  # B F h w C
        y = y.movedim(1, 3) if over_time else y.flatten(2, 3)[:, :, None]
        q, k, v = (y @ w[f"{name}.to_{one}.weight"].T + w[f"{name}.to_{one}.bias"] for one in "qkv")
        y = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        y = y @ w[f"{name}.to_out.0.weight"].T + w[f"{name}.to_out.0.bias"]
        y = y.movedim(3, 1) if over_time else y[:, :, 0].unflatten(2, x.shape[3:])
        return x + y.movedim(-1, 1)

    x = both(conv(x, "post_quant_conv"), "decoder.conv_in")
    x = resnet(x, "decoder.mid_block.resnets.0")
    x = attention(x, "decoder.mid_block.attentions.0.0", over_time=False)
    x = attention(x, "decoder.mid_block.attentions.0.1", over_time=True)
    x = resnet(x, "decoder.mid_block.resnets.1")
    for block in range(3):
        for number in range(2):
            x = resnet(x, f"decoder.up_blocks.{block}.resnets.{number}")
        name, (space, time) = f"decoder.up_blocks.{block}.upsamplers.0", upsampled.get(block, (False, False))
        if time:
            x = x.repeat_interleave(2, dim=2)[:, :, 1:]
            x = x + conv(x, f"{name}.conv1")
        if space:
            x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            x = x + conv(x, f"{name}.conv2")
        x = conv(x, f"{name}.conv3") if space or time else x
    x = both(functional.silu(norm(x, "decoder.conv_norm_out")), "decoder.conv_out")
    for _ in range(2):  # Haar: halves of each axis are sum and difference
        for axis in (4, 3, 2):
            channels = x.unflatten(1, (2, -1)) if axis == 2 else x.unflatten(1, (4 if axis == 4 else 2, 2, -1))
            low, high = channels.unbind(1) if axis == 2 else (half.flatten(1, 2) for half in channels.unbind(2))
            x = torch.stack([low + high, low - high], dim=axis + 1).flatten(axis, axis + 1)
    return x[:, :, 3:]


@pytest.mark.parametrize(
    ("strides", "upsampled"),
    [((4, 8), {0: (True, False)}), ((8, 8), {1: (True, True)}), ((4, 4), {})],
)
def test_videos_are_those_of_a_plain_computation(strides, upsampled):
    made = decoder({**TINY, "temporal_stride": strides[0], "spatial_stride": strides[1]})
    codes = torch.randint(0, 64_000, (2, 3, 2, 3), generator=torch.Generator().manual_seed(1))
    videos = made(codes)
    assert videos.shape == (2, 1 + 2 * strides[0], 3, 2 * strides[1], 3 * strides[1])
    expected = plain_videos(dict(made.named_parameters()), made.latents(codes), upsampled).transpose(1, 2)
    torch.testing.assert_close(videos, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


def test_a_model_of_videos_draws_and_decodes():
    """The first frames are those of the whole; a video that is longer than the decoder's is refused."""
    codes = {"vocab_size": 12 + 64_000, "lm_head_size": 64_000}
    known = KNOWN["BAAI/URSA-1.7B-FSQ320"]
    settings = Ursa("tiny", {**known.transformer, **TRANSFORMER, **codes}, TINY, known.scheduler)
    size = {"height": 8, "width": 16, "num_frames": 5, "train": Full()}
    model = UrsaModel(settings, None, config("tiny", **size), single_process(), 0)
    assert model.grid == (2, 1, 2)
    tokens = torch.tensor([[0, 1, 2, 63_999]])
    videos = model.decode(tokens)
    assert videos.shape == (1, 5, 3, 8, 16)
    assert torch.equal(model.decode(tokens, 2), videos[:, :2])
    logits = model.call(tokens, model.nothing(), lambda hidden, head: head(hidden))
    assert logits.shape == (1, 4, 64_000)
    with pytest.raises(UserError, match=r"model\.num_frames: the decoder of tiny makes 17 frames at most"):
        UrsaModel(settings, None, config("tiny", **{**size, "num_frames": 21}), single_process(), 0)


def test_the_known_model_is_counted_without_weights():
    """49 frames of 320 x 512 pixels are 13 x 40 x 64 codes."""
    size = {"height": 320, "width": 512, "num_frames": 49, "max_sequence_length": 320, "random_init": True}
    model = load_token_model(config("BAAI/URSA-1.7B-FSQ320", train=Full(), **size), World(META), 0)
    assert model.length == 33_280
    tokens = torch.zeros(1, model.length, dtype=torch.int64, device=META)
    assert model.decode(tokens).shape == (1, 49, 3, 320, 512)
