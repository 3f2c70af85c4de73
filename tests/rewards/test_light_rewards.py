"""Rewards that need no download: each against videos whose answer is known."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from flashgrpo.errors import UserError
from flashgrpo.rewards.frames import exposure, pick, sharpness
from flashgrpo.rewards.text import edit_distance, similarity, spelling
from flashgrpo.scoring.rewards import Rewards
from flashgrpo.scoring.settings import RewardConfig
from flashgrpo.types import Prompt

NAMES = ("frames:sharpness", "frames:exposure", "motion:amount", "motion:smoothness", "motion:flicker")
WORDS = ["OPEN LATE", "FRESH BREAD", "NO PARKING", "JAZZ TONIGHT"]


@pytest.mark.parametrize("name", NAMES)
def test_each_prefers_the_better_of_the_pair_that_it_declares(name):
    if name.startswith("motion"):
        pytest.importorskip("cv2")
    rewards = Rewards({"r": RewardConfig(call=f"flashgrpo.rewards.{name}")})
    pair = rewards.planted_pairs()["r"]
    table = rewards.score(torch.stack([pair.worse, pair.better]), [pair.prompt] * 2, watched=False)
    assert table.values[1, 0] > table.values[0, 0]


def shifted(pixels: int, frames: int = 5) -> torch.Tensor:
    """A texture that moves so many pixels a frame to the right: (1, F, 3, 96, 128)."""
    noise = torch.rand(1, 3, 24, 64, generator=torch.Generator().manual_seed(0))
    ground = torch.nn.functional.interpolate(noise, size=(96, 256), mode="bicubic").clamp(0, 1)[0]
    return torch.stack([ground[:, :, 64 - pixels * f : 192 - pixels * f] for f in range(frames)])[None]


def test_motion_is_measured_in_percent_of_the_diagonal():
    """Frames of 96 x 128 have a diagonal of 160 pixels: a shift of 4 is 2.5 %."""
    pytest.importorskip("cv2")
    from flashgrpo.rewards.motion import amount, flicker, smoothness

    assert float(amount(shifted(0), [""])) == pytest.approx(0, abs=0.01)
    assert float(amount(shifted(4), [""])) == pytest.approx(2.5, rel=0.1)
    assert float(amount(shifted(2), [""])) == pytest.approx(1.25, rel=0.1)
    assert float(smoothness(shifted(4), [""])) > -0.3
    pumping = shifted(0) * torch.tensor([1.0, 0.8, 1.0, 0.8, 1.0]).view(1, 5, 1, 1, 1)
    level = 255 * float(shifted(0).mean())
    assert float(flicker(pumping, [""])) == pytest.approx(-0.4 * level, rel=0.02)  # second difference 0.4
    assert float(flicker(shifted(0), [""])) == pytest.approx(0, abs=1e-3)
    with pytest.raises(ValueError, match="two frames at least"):
        amount(shifted(0, frames=1), [""])


def test_sharpness_falls_with_blur_and_exposure_with_distance_from_grey():
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    blurs = [torch.nn.functional.avg_pool2d(noise, size, 1, size // 2) for size in (1, 3, 5, 9)]
    values = sharpness(torch.stack(blurs), [""] * 4).tolist()
    assert values == sorted(values, reverse=True)
    greys = torch.stack([torch.full((1, 3, 8, 8), level) for level in (0.5, 0.7, 0.9, 1.0)])
    assert exposure(greys, [""] * 4).tolist() == pytest.approx([1.0, 0.6065, 0.1353, 0.0439], abs=1e-3)


def test_frames_are_picked_evenly():
    video = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 3, 2, 2)
    assert pick(video, 4)[:, 0, 0, 0].tolist() == [0, 3, 6, 9]
    assert len(pick(video, 99)) == 10


def test_distances_worked_by_hand():
    assert edit_distance("kitten", "sitting") == 3
    assert similarity("HELO", "hello") == pytest.approx(0.8)
    assert similarity("say HEL LO now", "hello") == 1.0
    assert similarity("", "hello") == 0.0
    assert similarity("something else entirely", "xy") == 0.0


@given(st.text("abc", max_size=7), st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_the_edit_distance_is_a_distance(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


def sign(text: str, seed: int) -> torch.Tensor:
    """A clip (2, 3, 96, 256) of a sign with a text, on a ground of noise, moving a little."""
    source = torch.Generator().manual_seed(seed)
    colors = torch.randint(0, 120, (3,), generator=source).tolist()
    frames = []
    for shift in (0, 5):
        noise = torch.randint(150, 256, (96, 256, 3), generator=source, dtype=torch.uint8)
        picture = Image.fromarray(noise.numpy())
        draw = ImageDraw.Draw(picture)
        draw.rectangle((10, 20, 246, 76), fill="white")
        draw.text((20 + shift, 30), text, fill=tuple(colors), font=ImageFont.load_default(26))
        frames.append(torch.tensor(list(picture.tobytes()), dtype=torch.uint8).view(96, 256, 3))
    return torch.stack(frames).permute(0, 3, 1, 2).float() / 255


def test_right_text_is_told_from_wrong_text():
    """AUC at least 0.95 over generated clips that show their text and clips that show another or a misspelt one."""
    pytest.importorskip("rapidocr")
    shown = [*WORDS, *WORDS[1:], WORDS[0], *(word.replace("E", "O").replace("A", "U") for word in WORDS)]
    wanted = WORDS * 3
    clips = torch.stack([sign(text, seed) for seed, text in enumerate(shown)])
    scores = spelling(clips, wanted, text=wanted, frames=1).tolist()
    right = [score for score, a, b in zip(scores, shown, wanted, strict=True) if a == b]
    wrong = [score for score, a, b in zip(scores, shown, wanted, strict=True) if a != b]
    pairs = list(itertools.product(right, wrong))
    assert sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs) >= 0.95
    with pytest.raises(ValueError, match="must name what each video shows"):
        spelling(clips[:1], ["a sign"], text=["  "])


def test_the_text_comes_from_a_column_of_the_prompt_file():
    rewards = Rewards({"r": RewardConfig(call="flashgrpo.rewards.text:spelling")})
    rewards.check_columns(Prompt("a sign that says OPEN", {"text": "OPEN"}), "prompts.train")
    with pytest.raises(UserError, match="missing a required argument: 'text'"):
        rewards.check_columns(Prompt("a sign that says OPEN", {}), "prompts.train")
