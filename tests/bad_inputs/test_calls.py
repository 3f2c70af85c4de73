"""Sentences of functions that are called from Python, or with what no command can bring about on this machine."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flashgrpo.config import RunConfig
from flashgrpo.distributed.ray import run_on_ray
from flashgrpo.learning.advantage import group_advantages
from flashgrpo.models.wan import WanModel
from flashgrpo.processes.flow.float8 import check_float8
from flashgrpo.processes.flow.schedule import SigmaGrid
from flashgrpo.rewards.clip import _head
from flashgrpo.rewards.judge import Judge
from flashgrpo.rewards.motion import amount
from flashgrpo.rewards.qwen import QwenReward
from flashgrpo.rewards.text import _reader
from flashgrpo.serving import wire
from flashgrpo.serving.http import Endpoint
from flashgrpo.serving.mp4 import read_mp4

GRID = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
JUDGE = Judge("http://x", "m", "{colour}", (0, 1), pattern="(.*)")
VIDEOS = torch.zeros(1, 2, 3, 16, 16)


def head_of_two() -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_file({"0.weight": torch.zeros(2, 4), "0.bias": torch.zeros(2)}, Path(folder) / "head.safetensors")
        _head(str(Path(folder) / "head.safetensors"), torch.device("cpu"))


CALLS: list[tuple[Callable[[], object], str]] = [
    (lambda: group_advantages(torch.zeros(2, 0)), "rewards are (P, G), a row per group and a column per member"),
    (
        lambda: group_advantages(torch.tensor([[1.0, 2.0], [0.0, float("nan")]])),
        "the reward of sample 1 of group 1 is nan",
    ),
    (lambda: SigmaGrid(GRID, torch.zeros(3)), "2 steps need as many timesteps, not (3,)"),
    (head_of_two, "has no last layer with one output"),
    (lambda: read_mp4(b"no video", VIDEOS[0]), "a file is no mp4"),
    (lambda: wire.pack("a", "pixels", VIDEOS, ["p"], {"n": [{1, 2}]}, "uint8"), "a column cannot be sent as JSON: "),
    (
        lambda: Judge("http://x", "m", "{colour}", (0, 1), pattern="(.*)")._text({"prompt": "p"}),
        "the judge's template has {colour}",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), CALLS, ids=[sentence[:40] for _, sentence in CALLS])
def test_a_call_is_refused(call, sentence):
    with pytest.raises(ValueError, match=r".") as told:
        call()
    assert sentence in str(told.value)


@pytest.mark.parametrize(
    ("package", "call", "sentence"),
    [
        ("ray.train.torch", lambda: run_on_ray(print, {}, 1, Path(), 1.0), "--ray-workers needs Ray: pip install"),
        ("cv2", lambda: amount(VIDEOS, ["p"]), "rewards.motion needs OpenCV: pip install"),
        ("rapidocr", _reader.__wrapped__, "rewards.text needs rapidocr: pip install"),
    ],
)
def test_a_package_that_is_missing_is_named(monkeypatch, package, call, sentence):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_gpu_without_float8(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match="this GPU has no units for float8; take bfloat16"):
        check_float8(torch.device("cuda"))


def test_a_token_with_blanks(monkeypatch):
    monkeypatch.setenv("FLASHGRPO_REWARD_TOKEN", "two words")
    with pytest.raises(ValueError, match="the token in FLASHGRPO_REWARD_TOKEN must be of visible ASCII characters"):
        Endpoint("http://x", None, "FLASHGRPO_REWARD_TOKEN", 1.0)


def test_a_base_that_is_another_model(monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda base: SimpleNamespace(model_type="bert"))
    with pytest.raises(ValueError, match="somewhere is a bert, not a Qwen2-VL"):
        QwenReward("somewhere", {}, [], [], "float32")


def test_a_pipeline_without_the_encoder_of_its_pictures():
    """A checkpoint whose transformer looks at pictures through CLIP, with `image_encoder: null` in its index."""
    processor = SimpleNamespace(preprocess=lambda picture, **size: torch.zeros(1, 3, 16, 16))
    pipeline = SimpleNamespace(video_processor=processor, image_encoder=None)
    model = SimpleNamespace(
        config=RunConfig.load("tiny", ["model.width=16", "model.height=16"]).model,
        pipeline=pipeline,
        device="cpu",
        source=SimpleNamespace(random=False, architecture=SimpleNamespace(of=lambda name: {"image_dim": 8})),
        _encode_frames=lambda frames: frames,
        fitted=lambda image: image,
    )
    with pytest.raises(ValueError, match="has no image_encoder, which its transformer needs"):
        WanModel.encode_images(model, [Image.new("RGB", (16, 16))])
