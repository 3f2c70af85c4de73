"""A model of videos with sound, trained by a reward that hears: what it hears is what its gradient is made of."""

import json

import pytest
import torch

from flashgrpo.assembly import Assembly
from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import single_process
from flashgrpo.models.lora import trained_parameters
from flashgrpo.rewards.loudness import loudness
from flashgrpo.scoring.scoring import untimed
from tests.end_to_end.test_families import recipe


@pytest.fixture
def parts(tmp_path):
    path = recipe(tmp_path, "ltx2")
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "rewards": {"loudness": {"call": "flashgrpo.rewards.loudness:loudness"}}}))
    return Assembly(RunConfig.load(path, ["rollout.retain=false"]), single_process())


def test_the_reward_of_a_sound_reaches_the_tokens_and_the_layers_of_sound(parts, monkeypatch):
    """The sound's level is the only reward: advantages are its, and so is the gradient of the sound's part of v."""
    process, model = parts.process, parts.process.model
    monkeypatch.setattr(model, "decode", lambda *given: pytest.fail("nobody looks"))
    drawn = parts.draw_and_score(parts.prompt_groups(0), untimed)
    compared = parts.compare(drawn)
    outputs = process.sample([parts.prompts[0]], [(0, "x")], lambda rows, some: None)
    [level] = loudness(None, ["a"], process.sound(outputs), process.sample_rate)
    assert -60 < float(level) < 0
    assert len(set(drawn.rewards.total.tolist())) > 1
    velocities, forward = [], type(model).forward

    def kept(self, *given, **named):
        v = forward(self, *given, **named)
        v.retain_grad()
        velocities.append(v)
        return v

    monkeypatch.setattr(type(model), "forward", kept)
    for batch in process.micro_batches(compared.record):
        for score, _ in process.replay(batch, ()):
            (score * batch.weight * batch.advantage).sum().backward()
    of_video, of_sound = model.split(torch.cat([v.grad for v in velocities]))
    told = of_sound.abs().amax(dim=2) > 0
    assert told.any(dim=0).all(), "every token of sound"
    assert of_video.abs().sum() > 0, "a step is one of both: the video's tokens are judged with it"
    for name, parameter in trained_parameters(process.network).items():
        assert parameter.grad is not None, name
    heard = [name for name, p in trained_parameters(process.network).items() if "audio_attn1" in name and p.grad.any()]
    assert heard


def test_an_update_by_sound_alone_moves_the_layers_of_sound(parts):
    before = {name: p.detach().clone() for name, p in trained_parameters(parts.process.network).items()}
    drawn = parts.draw_and_score(parts.prompt_groups(0), untimed)
    metrics = parts.learn(parts.compare(drawn).record)
    assert metrics["drift"] == 0
    moved = {name for name, p in trained_parameters(parts.process.network).items() if not torch.equal(p, before[name])}
    for layer in ("audio_attn1.to_q", "audio_attn2.to_out.0", "video_to_audio_attn.to_v", "audio_to_video_attn.to_v"):
        assert any(layer in name for name in moved), layer
