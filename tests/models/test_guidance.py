"""Kinds of guidance: a second branch, a number that the network is fed, none."""

from dataclasses import replace

import pytest
import torch

from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import single_process
from flashgrpo.errors import UserError
from flashgrpo.kinds.flow import FlowMemory, planned_cost
from flashgrpo.models.families import FAMILIES, REFUSED, guidance_kind, refusal
from flashgrpo.models.image import pack
from flashgrpo.models.load import load_model
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.processes.flow.network import guidance_of
from flashgrpo.processes.flow.rollout import noise_of
from flashgrpo.types import Prompt
from tests.end_to_end.test_families import recipe
from tests.families import KINDS

WORLD = single_process()
PROMPT = Prompt("a red circle", {})


def loaded(name, tmp_path, **settings):
    KINDS[name].build().save_pretrained(tmp_path / "model")
    return load_model(KINDS[name].config(tmp_path / "model", **settings), WORLD, 0, [PROMPT])


def test_an_embedded_scale_is_fed_to_one_branch(tmp_path, monkeypatch):
    model = loaded("flux1-dev", tmp_path)
    rows: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda network, x, *rest: rows.append(len(x)) or forward(network, x, *rest))
    x, grid = torch.ones(1, *model.latent_shape), model.grid(4)
    point = [GridPoint(grid.timesteps[:1], grid.sigmas[:1], torch.tensor([scale])) for scale in (1.0, 2.0, 4.0)]
    v = [model.velocity(x, p, model.encode([PROMPT])).detach() for p in point]
    assert rows == [1, 1, 1]
    assert not torch.allclose(v[0], v[1], atol=1e-4)
    assert not torch.allclose(v[1], v[2], atol=1e-4)


def test_what_guidance_costs(tmp_path):
    """Two branches of SD3.5 and one of FLUX.1-dev: plan, process and estimate agree."""
    costs, calls = {}, {}
    for name in ("sd35", "flux1-dev"):
        (tmp_path / name).mkdir()
        config = RunConfig.load(recipe(tmp_path / name, name), ["rollout.guidance_scale=4"])
        costs[name] = planned_cost(config, 0)
        calls[name] = FlowMemory(config)._branches
    assert calls == {"sd35": 2, "flux1-dev": 1}
    assert costs["sd35"].total == 2 * costs["flux1-dev"].total


def test_guidance_that_would_have_no_effect(tmp_path):
    model = loaded("flux1-schnell", tmp_path)
    with pytest.raises(UserError, match="distilled to sample without guidance; take 1, not 4"):
        guidance_of(model, model.grid(4), 4.0)
    assert guidance_of(model, model.grid(4), 1.0).stochastic.tolist() == [1] * 4
    with pytest.raises(UserError, match="has no branch that it would steer; leave it out"):
        loaded("flux1-schnell", tmp_path, negative_prompt="blurry")


def test_an_interval_needs_a_branch_to_leave_out(tmp_path):
    model = loaded("flux1-dev", tmp_path)
    with pytest.raises(UserError, match="guidance_interval: this model has one branch only"):
        guidance_of(model, model.grid(4), 4.0, interval=(0.2, 0.8))


def test_z_image_is_whole_on_every_process(tmp_path):
    """Its network is called once a picture, so ranks would call it differently often."""
    KINDS["z-image"].build().save_pretrained(tmp_path / "model")
    world = replace(WORLD, uses_fsdp=True)
    with pytest.raises(UserError, match="is called on one picture at a time"):
        load_model(KINDS["z-image"].config(tmp_path / "model"), world, 0, [PROMPT])


def test_guidance_of_a_distilled_checkpoint():
    settings = {"is_distilled": True}
    assert guidance_kind("Flux2KleinPipeline", {}, settings) == "none"
    assert guidance_kind("Flux2KleinPipeline", {}, {"is_distilled": False}) == "classifier-free"
    assert guidance_kind("FluxKontextPipeline", {"guidance_embeds": True}, {}) == "embedded"


def test_qwen_image_keeps_the_length_of_each_token(tmp_path):
    model = loaded("qwen-image", tmp_path)
    v_text, v_negative = noise_of(model, [(0, "noise"), (1, "noise")]).split(1)
    guided = model.guided(v_text, v_negative, torch.full((1, 1, 1, 1, 1), 4.0))
    straight, lengths = (
        v_negative + 4 * (v_text - v_negative),
        [pack(v[:, :, 0]).norm(dim=-1) for v in (guided, v_text)],
    )
    torch.testing.assert_close(*lengths)
    alike = torch.cosine_similarity(pack(guided[:, :, 0]), pack(straight[:, :, 0]), dim=-1)
    torch.testing.assert_close(alike, torch.ones_like(alike))


def test_images_are_one_frame(tmp_path):
    with pytest.raises(UserError, match="this model makes images, which are 1 frame, not 9"):
        loaded("sd35", tmp_path, num_frames=9)


@pytest.mark.parametrize("pipeline", list(REFUSED))
def test_a_pipeline_that_is_left_out_is_told_why(pipeline):
    assert f"{pipeline}, which is not supported ({REFUSED[pipeline]}); supported are WanPipeline" in refusal(pipeline)
    assert pipeline not in FAMILIES
