"""Flow-DPPO on recorded steps: the divergence that the mask is held against, through the real engine."""

from dataclasses import replace

import pytest
import torch

from flashgrpo.learning.objective import KlMasked
from flashgrpo.learning.optim import Optimizer
from flashgrpo.learning.settings import OptimConfig
from flashgrpo.learning.update import policy_update
from flashgrpo.models.lora import trained_parameters
from flashgrpo.presets import FLASH_DPPO, FLOW_DPPO
from tests.processes.flow.drawing import WORLD, draw, perturb

COLUMNS = ("kl_old",)


def test_the_divergence_is_that_of_the_step_from_the_policy_that_drew(model):
    """mean((mu - mu_old)^2) / (2 std^2) by the means themselves, and 0 with the weights that drew."""
    process, _, record = draw(model, FLOW_DPPO, groups=1, uses=2, columns=COLUMNS)
    part = record[(record.slot == 2).nonzero().flatten()]
    ((_, before),) = process.replay(part, COLUMNS)
    assert (before["kl_old"] == 0).all()
    perturb(model)
    ((_, after),) = process.replay(part, COLUMNS)
    state, table = part.state, process.source.table
    with torch.no_grad():
        v = process.source.velocities(2, state)
    mean, mean_old = table.mean(state.k, state.x, v), table.mean(state.k, state.x, state.old_v)
    expected = (mean - mean_old).square().flatten(1).mean(1) / (2 * float(table.std[2]) ** 2)
    torch.testing.assert_close(after["kl_old"], expected, rtol=1e-4, atol=1e-9)


def test_the_divergence_by_hand():
    """std 0.5 and means 0.1 and -0.1 apart: 0.01 / (2 * 0.25) = 0.02."""
    from flashgrpo.processes.flow.table import StepTable

    sigmas = torch.tensor([1.0, 0.5], dtype=torch.float64)
    table = StepTable(sigmas, torch.zeros(1).double(), torch.full((1,), 0.5).double())  # to_v = -0.5
    apart = torch.tensor([[0.2, -0.2]])
    assert table.kl(0, apart, torch.zeros(1, 2)).item() == pytest.approx(0.02)


def test_a_single_use_needs_no_old_velocities(model):
    _, _, record = draw(model, FLASH_DPPO, groups=1, uses=1, columns=COLUMNS)
    assert record.state.old_v is None
    _, _, record = draw(model, FLASH_DPPO, groups=1, uses=2, columns=COLUMNS)
    assert record.state.old_v is not None
    assert torch.equal(record.state[torch.tensor([1])].old_v, record.state.old_v[1:])


def test_later_steps_of_a_rollout_are_masked_once_they_are_far(model):
    """With a tau that nothing reaches no term is masked; with tau 0 those that go on in their direction are."""
    shares = {}
    for tau in (1e3, 0.0):
        process, _, record = draw(model, FLASH_DPPO, groups=1, size=4, uses=4, columns=COLUMNS)
        record = replace(record, advantage=torch.tensor([1.0, -1.0, 1.0, -1.0]))
        start = {name: value.detach().clone() for name, value in trained_parameters(model.network).items()}
        config = OptimConfig(lr=1e-3, passes=4)
        optimizer = Optimizer(trained_parameters(model.network), config, WORLD)
        metrics = policy_update(process, KlMasked(tau=tau), optimizer, record, config, WORLD)
        assert metrics["drift"] == 0
        shares[tau] = metrics["clip_fraction"]
        for name, parameter in trained_parameters(model.network).items():
            parameter.data.copy_(start[name])
    assert shares[1e3] == 0
    assert 0 < shares[0.0] <= 0.75
