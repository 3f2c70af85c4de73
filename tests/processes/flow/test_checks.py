"""What the doctor checks of the flow process alone."""

import pytest
import torch

from flashgrpo.presets import DANCE_GRPO, FLASH_GRPO, FLOW_GRPO, FLOW_GRPO_FAST, RECTIFICATION_ONLY
from flashgrpo.processes.flow.checks import distance_to_finish
from tests.processes.flow.drawing import draw, perturb


@pytest.fixture
def half(make_model):
    """The bundled model in bfloat16, off its start."""
    model = make_model("model.dtype=bfloat16")
    perturb(model)
    return model


@pytest.mark.parametrize("algorithm", [FLASH_GRPO, FLOW_GRPO, FLOW_GRPO_FAST, RECTIFICATION_ONLY])
@pytest.mark.parametrize(("micro_batch", "exact"), [(64, 1), (4, 3), (1, 4)])
def test_samples_are_finished_in_the_batches_that_they_were_drawn_in(half, algorithm, micro_batch, exact):
    """Bit for bit in bf16 with guidance, however the replay is cut."""
    drawn = {"groups": 3, "size": 2, "steps": 6, "micro_batch": micro_batch, "exact": exact, "guidance_scale": 4.5}
    process, latents, record = draw(half, algorithm, **drawn)
    assert distance_to_finish(process, record.state, latents, 0) == 0
    noisy = latents + 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert distance_to_finish(process, record.state, noisy, 0) > 0.01


def test_where_a_step_that_is_not_recorded_follows_nothing_is_said(half):
    process, latents, record = draw(half, DANCE_GRPO, groups=1, size=2, steps=6)
    assert distance_to_finish(process, record.state, latents, 0) is None
