"""Layers whose results a network drops are not trained: a run would rightly be told that they receive no gradient."""

import pytest

from flashgrpo.distributed.world import single_process
from flashgrpo.models.load import load_model
from flashgrpo.models.lora import trained_parameters
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.processes.flow.rollout import noise_of
from flashgrpo.types import Prompt
from tests.families import KINDS

PROMPT = Prompt("a red circle", {})


@pytest.mark.parametrize("name", ["sd35", "qwen-image"])
def test_full_training_leaves_out_what_is_dropped(name, tmp_path):
    KINDS[name].build().save_pretrained(tmp_path)
    model = load_model(KINDS[name].config(tmp_path, train={"kind": "full"}), single_process(), 0, [PROMPT])
    grid = model.grid(4)
    x = noise_of(model, [(0, "noise", 0)])
    point = GridPoint(grid.timesteps[1:2], grid.sigmas[1:2], grid.sigmas[1:2].float() * 0 + 1)
    model.velocity(x, point, model.encode([PROMPT])).square().mean().backward()
    trained = trained_parameters(model.network)
    assert not [parameter for parameter in trained if trained[parameter].grad is None]
    assert model.unused_layers()
    assert not [parameter for parameter in trained if parameter.startswith(tuple(model.unused_layers()))]
