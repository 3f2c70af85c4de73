"""Rewards that look at parts of videos: each under its own prompt, and the mean of a sample's parts."""

import pytest
import torch

from flashgrpo.distributed.world import single_process
from flashgrpo.errors import UserError
from flashgrpo.scoring.clips import ClipBatch
from flashgrpo.scoring.fit import check_process
from flashgrpo.scoring.inputs import LatentVideos, Pixels
from flashgrpo.scoring.rewards import Rewards
from flashgrpo.scoring.scoring import Scoring
from flashgrpo.scoring.settings import RewardConfig
from flashgrpo.types import Clip, Prompt
from tests.fakes import Colour

WORLD = single_process(computes=False)
HERE = __name__
RED, BLUE = Prompt("red", {}), Prompt("blue", {})
CLIPS = [[Clip(0, 2, RED), Clip(2, 5, BLUE)], [Clip(1, 3, RED)]]
VIDEOS = torch.arange(2 * 6).view(2, 6, 1, 1, 1).expand(-1, -1, 3, 2, 2).float() / 12
"""A video of six frames, each of one grey: 0, 1, ... twelfths."""
seen = []


def grey(videos, prompts, **columns):
    """The mean of each clip, and one more for a blue prompt."""
    seen.append((tuple(videos.shape), list(prompts)))
    means = videos.flatten(1).mean(dim=1)
    return {"grey": 12 * means, "blue": [float(prompt == "blue") for prompt in prompts]}


def uneven(videos, prompts, **columns):
    return {"long" if videos.shape[1] > 2 else "short": [0.0] * len(videos)}


def test_a_sample_has_the_mean_of_its_clips_and_clips_of_one_length_are_one_call():
    seen.clear()
    batch = ClipBatch(VIDEOS, CLIPS, fps=8.0)
    batch.wanted_by(1)
    values = batch.values("grey", grey, Pixels())
    assert values["grey"] == pytest.approx([(0.5 + 3) / 2, 7.5])
    assert values["blue"] == [0.5, 0.0]
    assert seen == [((2, 2, 3, 2, 2), ["red", "red"]), ((1, 3, 3, 2, 2), ["blue"])]
    assert [prompt.text for prompt in batch.prompts] == ["red", "red", "blue"]
    batch.done()


def test_other_components_for_some_clips_are_refused():
    batch = ClipBatch(VIDEOS, CLIPS, fps=8.0)
    batch.wanted_by(1)
    with pytest.raises(ValueError, match=r"returned .'short'. for some clips and .'long'. for others"):
        batch.values("uneven", uneven, Pixels())


def test_only_what_rewards_look_at_is_decoded():
    asked = []

    def media(outputs, frames):
        asked.append(frames)
        return VIDEOS[:, :frames]

    config = {"local": RewardConfig(call=f"{HERE}:grey", looks_at="chunk")}
    rewards = Rewards(config, 8.0)
    rewards.load(WORLD)
    scoring = Scoring(rewards, media, lambda view, number: CLIPS[number], WORLD, [RED, RED], False, 4)
    scoring.add(torch.arange(2), VIDEOS)
    table = scoring.table()
    assert table.values[:, 0].tolist() == pytest.approx([1.75, 7.5])
    assert asked == [5]


def test_views_that_a_model_has_not_and_latents_in_parts_are_refused():
    chunk = Rewards({"local": RewardConfig(call=f"{HERE}:grey", looks_at="chunk")}, 8.0)
    with pytest.raises(UserError, match=r"rewards.local.looks_at: this model shows no chunk"):
        check_process(chunk, process := Colour())
    process.views = ("whole", "chunk")
    check_process(chunk, process)
    latents = RewardConfig(call=f"{HERE}:grey", looks_at="clips", input=LatentVideos())
    with pytest.raises(UserError, match="latents are handed over whole; leave looks_at out"):
        Rewards({"local": latents}, 8.0).load(WORLD)
