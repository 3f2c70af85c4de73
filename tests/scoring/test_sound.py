"""Rewards that hear: what they are handed, and where a sound goes beside the video that it belongs to."""

import math
import re
import subprocess
from dataclasses import replace

import imageio_ffmpeg
import pytest
import torch

from flashgrpo.distributed.world import single_process
from flashgrpo.errors import UserError
from flashgrpo.media import suffix_of, with_sound, write_medium
from flashgrpo.rewards.loudness import loudness
from flashgrpo.sample import Pair
from flashgrpo.scoring.batch import Batch
from flashgrpo.scoring.fit import check_process
from flashgrpo.scoring.inputs import Pixels, VideoFiles
from flashgrpo.scoring.rewards import Rewards
from flashgrpo.scoring.scoring import Scoring, shown
from flashgrpo.scoring.settings import RewardConfig
from flashgrpo.types import Prompt
from flashgrpo.video import Film, lasting, write_video_of
from tests.fakes import Colour
from tests.videos import read_mp4

HERE, RATE = __name__, 8000
PROMPTS = [Prompt("a bell", {"n": number}) for number in range(5)]


class Ringing(Colour):
    """Videos of one colour, whose first number is also the amplitude of a square wave in two channels."""

    sample_rate = RATE

    def sound(self, outputs):
        wave = torch.tensor([1.0, -1.0]).repeat(RATE // 8)
        return (outputs[:, :1, None] * wave).expand(-1, 2, -1).contiguous()


def amplitude(videos, prompts, audio, sample_rate, **columns):
    """Hear the amplitude, and look at the colour, which is the same."""
    assert audio.shape == (len(prompts), 2, RATE // 4)
    assert (audio.dtype, sample_rate) == (torch.float32, RATE)
    torch.testing.assert_close(audio[:, 0, 0], videos[:, 0, 0, 0, 0])
    audio.zero_()  # its own copy
    return videos[:, 0, 0, 0, 0]


amplitude.hears = True


def again(videos, prompts, audio, **columns):
    return audio.amax(dim=(1, 2))


again.hears = again.compares = True


def deaf(videos, prompts):
    return [0.0] * len(prompts)


deaf.hears = True


def heard(files, prompts, audio, **columns):
    return [level_of(file) for file in files]


heard.hears, heard.takes = True, VideoFiles()


def level_of(file):
    """The loudest sample of a file, in [0, 1], by ffmpeg's own detector."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(file), "-af", "volumedetect", "-f", "null", "-"]
    said = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stderr
    return 10 ** (float(re.search(r"max_volume: (\S+) dB", said)[1]) / 20)


def nothing(view, number):
    return ()


def rewards_of(**calls):
    return Rewards({name: RewardConfig(call=f"{HERE}:{call}") for name, call in calls.items()}, 8.0)


def test_a_reward_that_hears_is_handed_the_sound_of_its_samples():
    rewards, process = rewards_of(amplitude="amplitude", again="again"), Ringing()
    check_process(rewards, process)
    rewards.load(single_process())
    keywords = {"keep": [1], "groups": [0, 0, 0, 1, 1], "sound": process.sound}
    scoring = Scoring(rewards, process.media, nothing, single_process(), PROMPTS, True, 2, **keywords)
    colours = torch.tensor([[0.1, 0, 0], [0.9, 0, 0], [0.5, 0, 0], [0.3, 0, 0], [0.7, 0, 0]])
    for rows in (torch.tensor([1, 3, 0]), torch.tensor([4, 2])):
        scoring.add(rows, colours[rows])
    torch.testing.assert_close(scoring.table().values, colours[:, :1].double().expand(-1, 2))
    film = scoring.kept[1]
    assert isinstance(film, Film)
    assert film.rate == RATE
    assert film.wave.shape == (2, RATE // 4)
    assert float(film.wave.max()) == pytest.approx(0.9)


def test_without_a_reward_that_hears_no_sound_is_made():
    process = Ringing()
    process.sound = lambda outputs: pytest.fail("nobody listens")
    rewards = Rewards({"grey": RewardConfig(call="flashgrpo.rewards.jpeg:compressibility")}, 8.0)
    check_process(rewards, process)
    scoring = Scoring(rewards, process.media, nothing, single_process(), PROMPTS[:1], True, 2, sound=process.sound)
    scoring.add(torch.tensor([0]), torch.zeros(1, 3))
    assert scoring.table().values.shape == (1, 1)


def test_a_model_without_sound_is_refused():
    rewards = rewards_of(bell="amplitude")
    with pytest.raises(UserError, match=r"^rewards.bell: it hears, and this model makes no sound; leave it out, or"):
        check_process(rewards, Colour())
    batch = Batch(PROMPTS[:1], 8.0, torch.zeros(1, 2, 3, 16, 16))
    batch.wanted_by(1)
    with pytest.raises(UserError, match="reward bell hears, and these videos come without a sound"):
        batch.values("bell", amplitude, Pixels())


def test_what_does_not_fit_a_reward_that_hears():
    rewards = rewards_of(bell="amplitude")
    with pytest.raises(
        UserError, match=r"rewards.bell hears, so that 'audio' is no column of prompts.train; rename it"
    ):
        rewards.check_columns(Prompt("a bell", {"audio": "x.wav"}), "prompts.train")
    with pytest.raises(UserError, match="the function cannot take the columns"):
        rewards_of(deaf="deaf").check_columns(Prompt("a bell", {}), "prompts.train")
    process = Ringing()
    process.views = ("whole", "chunk")
    rewards.configs["bell"] = rewards.configs["bell"].model_copy(update={"looks_at": "chunk"})
    with pytest.raises(UserError, match=r"rewards.bell.looks_at: a sound is handed over whole; leave looks_at out"):
        check_process(rewards, process)
    assert rewards.planted_pairs() == {}


@pytest.mark.parametrize(("wave", "level"), [(0.1, -20.0), (1.0, 0.0), (0.0, -60.0)])
def test_loudness_by_hand(wave, level):
    """A square wave of amplitude 0.1 has 20 log10(0.1) = -20 dBFS; silence counts as -60."""
    audio = torch.tensor([wave, -wave]).repeat(2, 2, 100)
    assert loudness(None, ["a", "b"], audio, RATE, level=-20.0).tolist() == pytest.approx(
        [-abs(level + 20.0)] * 2, abs=1e-6
    )


def test_loudness_of_a_sine_by_hand():
    """The mean square of a sine of amplitude 1 is 1/2: -3.01 dBFS."""
    audio = torch.sin(torch.arange(8000) * (2 * math.pi * 100 / 8000)).expand(1, 1, -1)
    assert float(loudness(None, ["a"], audio, 8000, level=0.0)) == pytest.approx(-3.0103, abs=1e-3)


def test_files_have_the_sound_in_them(tmp_path):
    video, wave = torch.rand(8, 3, 32, 32), 0.5 * torch.sin(torch.arange(RATE) * 0.3).expand(2, -1)
    write_medium(tmp_path / "a.mp4", with_sound(video, wave, RATE), 8.0)
    assert suffix_of(with_sound(video[:1], wave, RATE)) == ".mp4"
    assert with_sound("a text", None, None) == "a text"
    assert len(read_mp4(tmp_path / "a.mp4")) == 8
    assert level_of(tmp_path / "a.mp4") == pytest.approx(0.5, abs=0.05)
    batch = Batch(PROMPTS[:1], 8.0, video[None], sound=wave[None], sample_rate=RATE)
    batch.wanted_by(1)
    assert batch.values("heard", heard, heard.takes)[""] == pytest.approx([0.5], abs=0.05)
    batch.done()


def test_two_films_beside_each_other_are_heard_left_and_right(tmp_path):
    films = [Film(torch.rand(4, 3, 32, 32), torch.full((2, 10), level), RATE) for level in (0.1, 0.6)]
    pair = Pair(PROMPTS[0], 0, *films)
    both = pair.film(label=False)
    assert both.video.shape == (4, 3, 32, 32 + 4 + 32)
    torch.testing.assert_close(both.wave, torch.tensor([[0.1], [0.6]]).expand(-1, 10))
    assert isinstance(replace(pair, base=films[0].video).film(label=False), torch.Tensor)
    tone = torch.sin(torch.arange(2 * RATE) * 0.3).expand(2, -1)
    pieces = [replace(both, wave=0.1 * tone), replace(both, wave=0.6 * tone)]  # of half a second each
    write_video_of(tmp_path / "both.mp4", pieces, 8.0)
    assert len(read_mp4(tmp_path / "both.mp4")) == 8
    assert level_of(tmp_path / "both.mp4") == pytest.approx(0.6, abs=0.06)
    write_video_of(tmp_path / "both.gif", pieces, 8.0)  # which is silent
    assert lasting(tone, 3 * RATE)[:, 2 * RATE :].eq(0).all()
    assert lasting(tone, RATE).shape == (2, RATE)


def test_a_sample_that_is_shown_alone_has_its_sound():
    film = shown(Ringing(), torch.tensor([[0.5, 0.0, 0.0]]))
    assert float(film.wave.max()) == 0.5
    assert isinstance(shown(Colour(), torch.zeros(1, 3)), torch.Tensor)
