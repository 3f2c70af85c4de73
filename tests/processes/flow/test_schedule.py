"""Grids as diffusers' schedulers walk them, and the published one."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flashgrpo.errors import UserError
from flashgrpo.processes.flow.noise import Ode
from flashgrpo.processes.flow.schedule import SigmaGrid, grid_from_scheduler, shifted_grid
from flashgrpo.processes.flow.solvers import Euler
from tests.published import published_grid

PUBLISHED = [999, 982, 963, 944, 922, 899, 874, 847, 817, 785]
TODAY = [999, 982, 964, 944, 923, 900, 875, 848, 818, 786]


def unipc(**settings) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        **{"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0} | settings
    )


def test_published_grid_by_its_digits():
    grid = published_grid()
    assert grid.num_steps == 20
    assert grid.timesteps[:10].tolist() == PUBLISHED
    assert (1000 * grid.sigmas[:10]).int().tolist() == PUBLISHED
    assert grid.sigmas.dtype == torch.float64
    assert grid.sigmas[0].item() == pytest.approx(0.99967, abs=1e-5)
    assert grid.sigmas[-1] == 0


def test_unipc_of_todays_diffusers_by_its_digits():
    grid = grid_from_scheduler(unipc(), 20)
    assert grid.timesteps[:10].tolist() == TODAY
    assert (1000 * grid.sigmas[:10]).int().tolist() == TODAY
    assert 1 - 2e-6 < grid.sigmas[0] <= 1


@settings(max_examples=15, deadline=None)
@given(num_steps=st.integers(1, 60), shift=st.floats(0.5, 12), multistep=st.booleans())
@example(num_steps=1, shift=1.6242836250049317, multistep=False)  # whose sigma_0 is above 1 in float32
def test_grid_is_what_the_scheduler_walks(num_steps, shift, multistep):
    scheduler = unipc(flow_shift=shift) if multistep else FlowMatchEulerDiscreteScheduler(shift=shift)
    grid = grid_from_scheduler(scheduler, num_steps)
    scheduler.set_timesteps(num_steps)
    assert torch.equal(grid.sigmas, scheduler.sigmas.double().clamp(max=1))
    assert torch.equal(grid.timesteps, scheduler.timesteps)
    assert grid.timesteps.dtype == scheduler.timesteps.dtype
    assert (grid.timesteps - 1000 * grid.sigmas[:-1]).abs().max() < 1.001


def test_euler_steps_are_the_schedulers_steps():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    grid = grid_from_scheduler(scheduler, 5)
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(0)
    x = expected = torch.randn(2, 3, 4, generator=generator)
    walk = Euler().walk(grid, range(5))
    for k in range(5):
        v = torch.randn(2, 3, 4, generator=generator)
        x = walk.step(k, x, v)
        expected = scheduler.step(v, scheduler.timesteps[k], expected).prev_sample
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_euler_is_the_ode_row():
    """x - (sigma_k - sigma_{k+1}) v: 1 - 0.25 * 2 = 0.5 from sigma 1 to 0.75, 1 - 0.75 * 2 = -0.5 from there to 0."""
    sigmas, x, v = torch.tensor([1.0, 0.75, 0.0]).double(), torch.ones(1, 1), torch.full((1, 1), 2.0)
    walk = Euler().walk(SigmaGrid(sigmas, torch.tensor([1000.0, 750.0])), range(2))
    for k, expected in ((0, 0.5), (1, -0.5)):
        assert walk.step(k, x, v).item() == expected
        assert torch.equal(walk.step(k, x, v), Ode()(sigmas).mean(k, x, v))


def test_the_callers_scheduler_is_left_alone():
    scheduler = unipc()
    scheduler.set_timesteps(7)
    before = scheduler.sigmas.clone(), scheduler.timesteps.clone(), dict(scheduler.config)
    grid_from_scheduler(scheduler, 20, shift=5.0)
    assert torch.equal(scheduler.sigmas, before[0])
    assert torch.equal(scheduler.timesteps, before[1])
    assert dict(scheduler.config) == before[2]


@pytest.mark.parametrize("make", [lambda shift: unipc(flow_shift=shift), FlowMatchEulerDiscreteScheduler])
def test_shift_replaces_the_schedulers_own(make):
    overridden = grid_from_scheduler(make(shift=3.0), 8, shift=5.0)
    assert torch.equal(overridden.sigmas, grid_from_scheduler(make(shift=5.0), 8).sigmas)
    assert not torch.equal(overridden.sigmas, grid_from_scheduler(make(shift=3.0), 8).sigmas)


def test_a_shift_that_was_set_later_is_kept():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_shift(5.0)
    grid = grid_from_scheduler(scheduler, 6)
    scheduler.set_timesteps(6)
    assert torch.equal(grid.sigmas, scheduler.sigmas.double())


def test_dynamic_shifting_needs_a_fixed_shift():
    dynamic = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    with pytest.raises(UserError, match="set a fixed shift"):
        grid_from_scheduler(dynamic, 8)
    fixed = FlowMatchEulerDiscreteScheduler(shift=5.0)
    assert torch.equal(grid_from_scheduler(dynamic, 8, shift=5.0).sigmas, grid_from_scheduler(fixed, 8).sigmas)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        UniPCMultistepScheduler(),
        unipc(prediction_type="epsilon"),
        object(),
    ],
    ids=["ddim", "unipc without flow sigmas", "unipc of an epsilon model", "no scheduler"],
)
def test_schedulers_of_other_processes_are_refused(scheduler):
    with pytest.raises(UserError, match="no flow scheduler"):
        grid_from_scheduler(scheduler, 8)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        unipc(final_sigmas_type="sigma_min"),
    ],
    ids=["two calls a step", "rising", "stops early"],
)
def test_grids_that_do_not_fall_are_refused(scheduler):
    with pytest.raises(UserError, match="cannot be sampled"):
        grid_from_scheduler(scheduler, 4)


def test_shifted_grid_by_hand():
    """u = 1, 3/4, 1/2, 1/4, 0 with shift 3: 3u / (1 + 2u) = 1, 9/10, 3/4, 1/2, 0."""
    grid = shifted_grid(4, shift=3.0)
    torch.testing.assert_close(grid.sigmas, torch.tensor([1, 0.9, 0.75, 0.5, 0], dtype=torch.float64))
    torch.testing.assert_close(grid.timesteps, torch.tensor([1000.0, 900.0, 750.0, 500.0]))


@pytest.mark.parametrize("make", [shifted_grid, lambda n, shift: grid_from_scheduler(unipc(), n, shift)])
def test_impossible_grids_are_refused(make):
    with pytest.raises(UserError, match="at least one denoising step"):
        make(0, 3.0)
    for shift in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="shift"):
            make(8, shift)


def test_a_grid_needs_a_timestep_per_step():
    with pytest.raises(ValueError, match="timesteps"):
        SigmaGrid(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), torch.tensor([1000, 500, 0]))
