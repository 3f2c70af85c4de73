"""Images and texts go the way of videos: to rewards, into the run directory, and into what `sample` writes."""

import numpy as np
import pytest
import torch
from PIL import Image

from flashgrpo.assembly import Assembly
from flashgrpo.distributed.world import single_process
from flashgrpo.doctor.checks import planted_pairs
from flashgrpo.doctor.trial import Trial
from flashgrpo.errors import UserError
from flashgrpo.media import LINE, labelled, stacked, strip, suffix_of
from flashgrpo.run.gallery import Gallery
from flashgrpo.sample import Pair
from flashgrpo.scoring.heldout import Evaluator, evaluation_record
from flashgrpo.scoring.inputs import LatentVideos, Pixels, VideoFiles
from flashgrpo.scoring.rewards import Rewards
from flashgrpo.scoring.settings import HeldoutConfig, RewardConfig
from flashgrpo.types import PlantedPair, Prompt
from flashgrpo.video import write_video_of
from tests.fakes import Colour, Picture, Writer

HERE = "tests.scoring.test_media"
WORLD = single_process(computes=False)
PROMPTS = [Prompt(f"colour {i}", {"n": i}) for i in range(6)]


def red_of_images(videos, prompts, **columns):
    assert videos.shape[1:] == (1, 3, 16, 16)
    return videos[:, 0, 0].mean(dim=(1, 2))


def red_of_texts(texts, prompts, **columns):
    assert all(isinstance(text, str) for text in texts)
    return [float(text.split(",")[0].removeprefix("red ")) for text in texts]


def red_of_files(paths, prompts, **columns):
    assert all(path.endswith(".png") for path in paths)
    return [float(np.asarray(Image.open(path))[..., 0].mean() / 255) for path in paths]


def red_of_outputs(outputs, prompts, **columns):
    return outputs[:, 0]


def evaluator(process, *rewards: str, **settings) -> Evaluator:
    configs = {name: RewardConfig(call=f"{HERE}:{name}", **settings) for name in rewards}
    return Evaluator(process, HeldoutConfig(videos=2), PROMPTS, Rewards(configs), WORLD, 2, False)


def test_rewards_get_images_as_one_frame_and_texts_as_strings():
    expected = evaluator(Colour()).resample(range(6))[:, 0].double()
    images = evaluator(Picture(), "red_of_images")().table.values[:, 0]
    texts = evaluator(Writer(), "red_of_texts")().table.values[:, 0]
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(texts, expected, rtol=0, atol=0.006)
    files = evaluator(Picture(), "red_of_files", input=VideoFiles())().table.values[:, 0]
    torch.testing.assert_close(files, expected, rtol=0, atol=0.51 / 255)  # PNG of 8 bits, and nothing lost beside
    outputs = evaluator(Writer(), "red_of_outputs", input=LatentVideos())().table.values[:, 0]
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("takes", "what"), [(Pixels(stride=2), "frames of a stride"), (VideoFiles(), "files")])
def test_a_reward_of_frames_cannot_judge_texts(takes, what):
    with pytest.raises(UserError, match=f"reward red_of_texts looks at {what}.* and this model makes texts"):
        evaluator(Writer(), "red_of_texts", input=takes)()


@pytest.mark.parametrize(("process", "reward"), [(Picture, "red_of_images"), (Writer, "red_of_texts")])
def test_what_is_kept_is_written_as_what_it_is(process, reward, tmp_path):
    process = process()
    scored = evaluator(process, reward)
    base, ending = scored(), {Picture: ".png", Writer: ".txt"}[type(process)]
    gallery = Gallery(tmp_path, scored, process, WORLD, 8.0)
    first = evaluation_record(0, base, None, 1)
    assert list(gallery.keep(first, first["samples"], base, True)) == ["000", "003"]
    with torch.no_grad():
        process.network[0].bias += 1
    tuned = scored()
    line = evaluation_record(1, tuned, first, 1)
    gallery.keep(line, first["samples"], tuned, True)
    shown = [sample for sample in line["samples"] if "video" in sample]
    assert len(shown) > 2, "those that changed most are written beside those that nobody chose"
    for sample in shown:
        files = [tmp_path / sample[key] for key in ("base_video", "video")]
        assert {file.suffix for file in files} == {ending}
        if ending == ".txt":
            values = red_of_texts([file.read_text() for file in files], [])
        else:
            values = red_of_files([str(file) for file in files], [])
        assert values[1] == pytest.approx(sample["reward"], abs=0.006)


def test_a_pair_is_a_picture_or_a_text():
    black, white = torch.zeros(1, 3, 4, 6), torch.ones(1, 3, 4, 6)
    one, other = Pair(PROMPTS[0], 0, black, white), Pair(PROMPTS[1], 7, white, black)
    image = stacked(one.picture(False), other.picture(False))
    assert (suffix_of(image), image.shape) == (".png", (1, 3, 4 + 4 + 4, 6 + 4 + 6))
    assert [float(image[..., row, column].mean()) for row in (0, -1) for column in (0, -1)] == [0, 1, 1, 0]
    text = Pair(PROMPTS[1], 7, "never", "always", (0.25, 0.5)).text
    parts = ["colour 1 (seed 7, reward 0.250 → 0.500)", "never", "always"]
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)
    assert "reward" not in Pair(PROMPTS[1], 7, "never", "always").text


def test_a_contact_sheet_has_some_frames_of_each_video():
    """Of 9 frames those at 0, 2, 4, 6 and 8; of 3 all."""
    frames = torch.arange(9.0)[:, None, None, None].expand(9, 3, 4, 6) / 8
    assert strip(frames)[0, 0, 0, ::7].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert strip(frames[:3]).shape == (1, 3, 4, 3 * 6 + 2)
    assert Pair(PROMPTS[0], 0, frames, frames).picture(False, as_strip=True).shape == (1, 3, 4, 2 * (5 * 6 + 4) + 4)


def test_a_label_is_below_and_of_one_height():
    frames = torch.zeros(2, 3, 48, 100)
    shown = labelled(frames, "a red circle")
    assert shown.shape == (2, 3, 4 * 48 + 58, 400)
    assert shown[:, :, : 4 * 48].max() == 0
    below = shown[:, :, 4 * 48 :]
    assert below.max() == 1
    assert below.min() < 0.5
    long = labelled(frames, "every word of a very long prompt that never ends " * 20)
    assert long.shape == shown.shape
    assert long[0, 0, -LINE:].min() < 0.5, "in the last of three lines, too"
    assert (labelled(frames, "кот и π") != labelled(frames, "")).any()


@pytest.mark.parametrize("fps", [8.0, 16.0, 30.0])
def test_a_gif_has_every_frame(tmp_path, fps):
    frames = torch.linspace(0, 1, 9)[:, None, None, None].expand(9, 3, 48, 64)
    write_video_of(tmp_path / "a.gif", iter([frames[:4], frames[4:]]), fps)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (9, (256, 192), 0)
        levels = []
        for number in range(9):
            gif.seek(number)
            levels.append(np.asarray(gif.convert("RGB")).mean() / 255)
    assert levels == pytest.approx(torch.linspace(0, 1, 9).tolist(), abs=0.02)


def rightly_red(texts, prompts, **columns):
    return red_of_texts(texts, prompts)


rightly_red.planted_pair = PlantedPair(PROMPTS[0], "red 0.1, green 0.5", "red 0.9, green 0.5")


def test_a_planted_pair_may_be_of_texts():
    parts, trial = Assembly.__new__(Assembly), Trial.__new__(Trial)
    parts.world, parts.rewards = WORLD, Rewards({"red": RewardConfig(call=f"{HERE}:rightly_red")})
    assert planted_pairs(parts, trial).sentence == "ranked as declared: red"
