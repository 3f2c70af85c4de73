"""What a family says of a size: a shift that is for another resolution, places of text that a kernel cannot serve."""

from types import SimpleNamespace

import pytest
import torch

from flashgrpo.errors import UserError
from flashgrpo.models.ltx import LtxModel
from flashgrpo.models.settings import ModelConfig
from flashgrpo.models.wan import WanModel

VAE = SimpleNamespace(scale_factor_spatial=8, scale_factor_temporal=4, z_dim=16)
NETWORK = {"patch_size": (1, 2, 2)}


def said(height: int, width: int, shift: float | None, flow_shift: float | None) -> list[str]:
    words: list[str] = []
    model = object.__new__(WanModel)
    scheduler = SimpleNamespace(config={"flow_shift": flow_shift})
    model.pipeline = SimpleNamespace(vae=SimpleNamespace(config=VAE), scheduler=scheduler)
    model.source = SimpleNamespace(architecture=SimpleNamespace(of=lambda part: NETWORK))
    model.config = ModelConfig(path="tiny", height=height, width=width, num_frames=81, shift=shift)
    model.say = words.append
    assert model.shape_of_latents() == (16, 21, height // 8, width // 8)
    return words


@pytest.mark.parametrize("size", [(720, 1280), (1280, 720), (704, 1280)])
def test_a_shift_for_480p_at_720p(size):
    [sentence] = said(*size, None, 3.0)
    assert "flow_shift 3, which is for 480p; Wan's authors advise 5 at 720p: model.shift=5" in sentence


@pytest.mark.parametrize(("shift", "flow_shift"), [(3.0, 3.0), (None, 5.0), (None, None)])
def test_a_shift_that_was_chosen(shift, flow_shift):
    assert said(720, 1280, shift, flow_shift) == []
    assert said(480, 832, None, 3.0) == []


def test_a_shift_that_skyreels_examples_take():
    model = object.__new__(WanModel)
    for name, advised in (("SkyReelsV2Pipeline", 8.0), ("SkyReelsV2ImageToVideoPipeline", 5.0)):
        model.pipeline = type(name, (), {})()
        assert model._advised_shift() == (advised, f"; SkyReels' examples take {advised:g}")


@pytest.mark.parametrize("attention", [None, "native", "_native_cudnn"])
def test_places_of_text_that_cudnn_cannot_serve(attention):
    model = object.__new__(LtxModel)
    model.device = torch.device("cuda")
    model.config = SimpleNamespace(max_sequence_length=192, attention=attention)
    with pytest.raises(UserError, match=r"over 192 places of text can give NaN .* take a multiple of 128"):
        model.shape_of_latents()
