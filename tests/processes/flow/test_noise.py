"""Noise kinds: golden numbers of the published grid, densities against torch.distributions, marginals of the SDE."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch.distributions import Normal, kl_divergence

from flashgrpo.processes.flow.noise import ConstantSde, Cps, FlowSde, LinearSde, Ode
from flashgrpo.processes.flow.schedule import shifted_grid
from flashgrpo.processes.flow.table import StepTable
from tests.published import published_grid

REFUSED = (ValueError, TypeCheckError)  # shapes are refused by jaxtyping where its hook is on, else by the function
STOCHASTIC = [LinearSde(), FlowSde(), ConstantSde(), Cps()]

# Published grid of 20 steps, g linear, eta 1: 1 / lambda of the first ten steps.
GOLDEN = [7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754]

kinds = st.one_of(
    st.builds(LinearSde, st.floats(0.05, 2.0)),
    st.builds(FlowSde, st.floats(0.05, 2.0)),
    st.builds(ConstantSde, st.floats(0.05, 2.0)),
    st.builds(Cps, st.floats(0.05, 1.0)),
)
grids = st.one_of(
    st.builds(lambda n, shift: shifted_grid(n, shift).sigmas, st.integers(2, 30), st.floats(0.5, 12.0)),
    st.builds(lambda n, shift: published_grid(n, shift).sigmas, st.integers(2, 30), st.floats(0.5, 12.0)),
)


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def x0_and_eps(sigma: float, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x - sigma * v, x + (1 - sigma) * v


def test_golden_rectification_of_the_published_grid():
    rectification = LinearSde(eta=1.0)(published_grid().sigmas).rectification
    torch.testing.assert_close(rectification[:10].tolist(), GOLDEN, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "steps", "spread", "digits"),
    [(LinearSde(1.0), 10, 1.98, 2), (LinearSde(1.0), 20, 21.8, 1), (FlowSde(0.7), 20, 66, 0)],
)
def test_golden_spread_of_lambda(kind, steps, spread, digits):
    rectification = kind(published_grid().sigmas).rectification[:steps]
    assert round(float(rectification.max() / rectification.min()), digits) == spread


def test_closed_form_of_lambda_for_sde_steps():
    """lambda = sqrt(d)/g + g sqrt(d) (1 - sigma)/(2 sigma), here with g = 0.3."""
    sigmas = shifted_grid(7, 3.0).sigmas
    sigma, d = sigmas[:-1], -sigmas.diff()
    expected = d.sqrt() / 0.3 + 0.3 * d.sqrt() * (1 - sigma) / (2 * sigma)
    torch.testing.assert_close(1 / ConstantSde(0.3)(sigmas).rectification, expected)


def test_one_step_by_hand():
    """sigma 0.5 -> 0.25, g = 0.4: c = 0.25 - 0.16 * 0.25 / 1 = 0.21, std = 0.4 * 0.5 = 0.2; b = 0.105 - 0.375 = -0.27.

    x = 1, v = 2: x0_hat = 0, eps_hat = 2, mean = 0.75 * 0 + 0.21 * 2 = 0.42; with noise 0.5 x_next = 0.52 and
    log_prob = -0.125 - log 0.2 - 0.918939 = 0.565499; KL to v_ref = 1: 0.27^2 / (2 * 0.04) = 0.91125.
    """
    table = ConstantSde(0.4)(torch.tensor([0.5, 0.25, 0.0]))
    x, v, noise = torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([[0.5]])
    assert table.c[0] == pytest.approx(0.21)
    assert table.std[0] == pytest.approx(0.2)
    assert table.rectification[0] == pytest.approx(0.2 / 0.27)
    assert table.mean(0, x, v).item() == pytest.approx(0.42)
    x_next = table.sample(0, x, v, noise)
    assert x_next.item() == pytest.approx(0.52)
    assert table.log_prob(0, x_next, x, v).item() == pytest.approx(0.565499, abs=1e-6)
    assert table.kl(0, v, torch.tensor([[1.0]])).item() == pytest.approx(0.91125)


@pytest.mark.parametrize("kind", STOCHASTIC, ids=lambda kind: kind.kind)
def test_mean_mixes_predicted_clean_latent_and_noise(kind):
    sigmas = published_grid().sigmas
    table, x, v = kind(sigmas), gaussian(0, 3, 4, 2), gaussian(1, 3, 4, 2)
    for k in range(20):
        x0_hat, eps_hat = x0_and_eps(float(sigmas[k]), x, v)
        expected = (1 - float(sigmas[k + 1])) * x0_hat + float(table.c[k]) * eps_hat
        torch.testing.assert_close(table.mean(k, x, v), expected, atol=2e-6, rtol=2e-6)


@settings(max_examples=25, deadline=None)
@given(kind=kinds, sigmas=grids, data=st.data())
def test_gradient_of_log_prob_is_lambda_times_noise(kind, sigmas, data):
    """|d log_prob / d v| = lambda |xi| / D, by autograd; lambda is what the rectification takes out."""
    table = kind(sigmas)
    k = data.draw(st.integers(0, table.num_steps - 2))
    x, v, xi = gaussian(1, 2, 3, 4), gaussian(2, 2, 3, 4).requires_grad_(), gaussian(3, 2, 3, 4)
    x_next = table.sample(k, x, v.detach(), xi)
    (gradient,) = torch.autograd.grad(table.log_prob(k, x_next, x, v).sum(), v)
    scale = 1 / float(table.rectification[k])
    # x_next is rounded to float32, so xi is recovered to about 1e-6 / std
    tolerance = scale * (1e-5 + 2e-6 / float(table.std[k])) / 12
    torch.testing.assert_close(gradient.abs(), scale * xi.abs() / 12, atol=tolerance, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(kind=kinds, sigmas=grids, data=st.data())
def test_density_is_that_of_torch_distributions(kind, sigmas, data):
    table = kind(sigmas)
    k = torch.tensor(data.draw(st.lists(st.integers(0, table.num_steps - 2), min_size=3, max_size=3)))
    x, v, v_ref, noise = (gaussian(seed, 3, 2, 5) for seed in range(4))
    x_next = table.sample(k, x, v, noise)
    std = table.std[k].float().reshape(3, 1, 1)
    policy, reference = Normal(table.mean(k, x, v), std), Normal(table.mean(k, x, v_ref), std)
    log_prob = policy.log_prob(x_next).mean((1, 2))
    torch.testing.assert_close(table.log_prob(k, x_next, x, v), log_prob, atol=1e-5, rtol=1e-5)
    kl = kl_divergence(policy, reference).mean((1, 2))
    torch.testing.assert_close(table.kl(k, v, v_ref), kl, atol=1e-6, rtol=1e-3)


@given(eta=st.floats(0.01, 1.0), sigmas=grids)
@settings(max_examples=20, deadline=None)
def test_cps_keeps_the_level_of_noise(eta, sigmas):
    table = Cps(eta)(sigmas)
    torch.testing.assert_close(table.c**2 + table.std**2, sigmas[1:] ** 2)
    torch.testing.assert_close(table.std, sigmas[1:] * math.sin(eta * math.pi / 2))


def test_sde_rows_are_the_first_order_of_cps():
    """With g sqrt(d) = sigma_next sin(angle), both c agree up to the square of the noise's share, here 1e-3."""
    sigmas = torch.linspace(0.9, 0.1, 801, dtype=torch.float64)
    sde, angle = ConstantSde(0.1)(sigmas), 2 / math.pi * (0.1 * math.sqrt(1e-3) / sigmas[400].item())
    cps = Cps(angle)(sigmas)
    assert cps.std[399] == pytest.approx(sde.std[399].item(), rel=1e-4)
    assert cps.c[399] - sigmas[400] == pytest.approx((sde.c[399] - sigmas[400]).item(), rel=5e-3)


@pytest.mark.parametrize("kind", [LinearSde, FlowSde, ConstantSde, Cps])
def test_without_noise_every_kind_is_the_ode(kind):
    sigmas = shifted_grid(9, 3.0).sigmas
    table, ode = kind(1e-9)(sigmas), Ode()(sigmas)
    torch.testing.assert_close(table.c, ode.c, atol=1e-12, rtol=0)
    assert table.std.max() < 1e-8
    assert torch.equal(ode.c, sigmas[1:])
    assert not ode.std.any()
    assert not ode.rectification.any()


def end_of_walk(table: StepTable, mean: float, std: float) -> tuple[float, float]:
    """Mean and std of x at the end of the grid, exactly, for data N(mean, std^2) and its own velocity field.

    Given x at sigma, with V = (1 - sigma)^2 std^2 + sigma^2 and r = x - (1 - sigma) mean, the expected noise is
    sigma r / V and the expected data mean + (1 - sigma) std^2 r / V; the velocity is their difference. It is affine in
    x, so a step maps N(m, s^2) to another Gaussian, and the table's own mean at x = 0 and x = 1 says to which.
    """
    m, s = (1 - float(table.sigmas[0])) * mean, math.hypot((1 - float(table.sigmas[0])) * std, float(table.sigmas[0]))
    for k, sigma in enumerate(table.sigmas[:-1].tolist()):
        x = torch.tensor([[0.0], [1.0]])
        r = x - (1 - sigma) * mean
        v = (sigma - (1 - sigma) * std**2) * r / ((1 - sigma) ** 2 * std**2 + sigma**2) - mean
        at_0, at_1 = table.mean(k, x, v).flatten().double().tolist()
        m, s = at_0 + (at_1 - at_0) * m, math.hypot((at_1 - at_0) * s, float(table.std[k]))
    return m, s


@pytest.mark.parametrize(
    "kind_for",
    [
        lambda n: Ode(),
        lambda n: LinearSde(1.0),
        lambda n: ConstantSde(0.3),
        lambda n: Cps(0.5 / math.sqrt(n)),  # eta is a share of the noise per step: that of an SDE falls with sqrt(N)
    ],
    ids=["ode", "linear", "constant", "cps"],
)
def test_sde_keeps_the_marginals_of_gaussian_data_as_steps_grow(kind_for):
    """Data N(0.5, 0.4^2), from pure noise to sigma = 0.05: four times the steps leave a quarter of the std's error."""
    target, errors = math.hypot(0.95 * 0.4, 0.05), []
    for n in (20, 80, 320):
        m, s = end_of_walk(kind_for(n)(torch.linspace(1.0, 0.05, n + 1, dtype=torch.float64)), 0.5, 0.4)
        errors.append(abs(s - target))
        assert m == pytest.approx(0.95 * 0.5, abs=0.5 / n)
    assert errors[0] < 0.05
    assert errors[1] < 0.3 * errors[0]
    assert errors[2] < 0.3 * errors[1]


def test_flow_sde_keeps_the_marginals_away_from_its_singular_end():
    target, errors = math.hypot(0.95 * 0.4, 0.05), []
    for n in (20, 80, 320):
        _, s = end_of_walk(FlowSde(0.7)(torch.linspace(0.95, 0.05, n + 1, dtype=torch.float64)), 0.5, 0.4)
        errors.append(abs(s - target))
    assert errors[0] < 0.05
    assert errors[1] < 0.3 * errors[0]
    assert errors[2] < 0.3 * errors[1]


def test_samples_have_the_marginal_that_the_recursion_says():
    """The same walk with drawn noise: 50,000 samples end with the std of the data up to 1 %."""
    sigmas = torch.linspace(1.0, 0.05, 41, dtype=torch.float64)
    table, generator = LinearSde()(sigmas), torch.Generator().manual_seed(0)
    x = torch.randn(50_000, 1, generator=generator)
    for k, sigma in enumerate(sigmas[:-1].tolist()):
        v = (sigma - (1 - sigma) * 0.16) * (x - (1 - sigma) * 0.5) / ((1 - sigma) ** 2 * 0.16 + sigma**2) - 0.5
        x = table.sample(k, x, v, torch.randn(x.shape, generator=generator))
    m, s = end_of_walk(table, 0.5, 0.4)
    assert x.mean().item() == pytest.approx(m, abs=0.006)
    assert x.std().item() == pytest.approx(s, rel=0.01)


@pytest.mark.parametrize("kind", [Ode(), *STOCHASTIC], ids=lambda kind: kind.kind)
@pytest.mark.parametrize("start", [1.0, 1 - 1e-6, 0.99967, 0.9])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 20])
def test_both_ends_of_a_grid_are_finite(kind, start, num_steps):
    sigmas = torch.linspace(start, 0, num_steps + 1, dtype=torch.float64)
    table = kind(sigmas)
    for value in (table.c, table.std, table.to_x, table.to_v, table.rectification):
        assert value.isfinite().all()
    assert (table.to_v < 0).all()
    assert table.std.max() <= 1.0
    x, v, noise = gaussian(0, 2, 3), gaussian(1, 2, 3), gaussian(2, 2, 3)
    for k in range(num_steps):
        x_next = table.sample(k, x, v, noise)
        assert x_next.isfinite().all()
        if table.std[k] > 0:
            assert table.log_prob(k, x_next, x, v).isfinite().all()


def test_first_step_of_flow_depends_continuously_on_the_start():
    """0.7 sqrt(sigma / (1 - sigma_1)): no jump between a grid that starts at 1 and one that starts just below."""
    exact = FlowSde()(torch.tensor([1.0, 0.98, 0.5, 0.0], dtype=torch.float64))
    near = FlowSde()(torch.tensor([1 - 1e-6, 0.98, 0.5, 0.0], dtype=torch.float64))
    assert exact.std[0] == pytest.approx(0.7 * math.sqrt(1 / 0.02) * math.sqrt(0.02))
    torch.testing.assert_close(near.std, exact.std, atol=1e-4, rtol=0)
    torch.testing.assert_close(near.c, exact.c, atol=1e-4, rtol=0)


def test_equal_inputs_give_equal_bits_in_any_batch():
    """An int k or one per row, alone or beside others, with two threads to share a sum: one density per row."""
    table = LinearSde()(published_grid().sigmas)
    x, v, noise = (gaussian(seed, 4, 16, 50, 50) for seed in range(3))
    k = torch.tensor([3, 3, 7, 3])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        x_next = table.sample(k, x, v, noise)
        together = table.log_prob(k, x_next, x, v)
        alone = [table.log_prob(int(k[i]), x_next[i : i + 1], x[i : i + 1], v[i : i + 1]) for i in range(4)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(alone), together)
    assert torch.equal(table.sample(3, x, v, noise)[[0, 1, 3]], x_next[[0, 1, 3]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_everything_is_computed_in_float32(dtype):
    table = ConstantSde()(published_grid().sigmas)
    x, v, noise = (gaussian(seed, 2, 8).to(dtype) for seed in range(3))
    x_next = table.sample(5, x, v, noise)
    assert x_next.dtype == torch.float32
    assert torch.equal(x_next, table.sample(5, x.float(), v.float(), noise.float()))
    log_prob = table.log_prob(5, x_next, x, v)
    assert log_prob.dtype == torch.float32
    assert torch.equal(log_prob, table.log_prob(5, x_next, x.float(), v.float()))
    assert table.std.dtype == table.c.dtype == table.rectification.dtype == torch.float64


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 4, 5, 6)])
def test_latents_of_any_rank(shape):
    table = LinearSde()(published_grid().sigmas)
    x, v, noise = (gaussian(seed, *shape) for seed in range(3))
    x_next = table.sample(torch.tensor([0, 4, 9]), x, v, noise)
    assert x_next.shape == shape
    assert table.log_prob(2, x_next, x, v).shape == table.kl(2, x, v).shape == (3,)


def test_deterministic_steps_have_no_density():
    x = gaussian(0, 2, 3)
    with pytest.raises(ValueError, match="step 4 is deterministic"):
        Ode()(published_grid().sigmas).log_prob(4, x, x, x)
    with pytest.raises(ValueError, match="step 19 is deterministic"):  # CPS adds nothing on the way to sigma = 0
        Cps()(published_grid().sigmas).kl(torch.tensor([3, 19]), x, x)


@pytest.mark.parametrize("k", [20, -1, torch.tensor([0, 20])])
def test_steps_outside_the_grid_are_refused(k):
    x = gaussian(0, 2, 3)
    with pytest.raises(ValueError, match="outside the grid"):
        LinearSde()(published_grid().sigmas).mean(k, x, x)


@pytest.mark.parametrize(
    "k", [torch.tensor([1]), torch.tensor([[1], [2]]), torch.tensor([1.0, 2.0]), torch.tensor([True, False])]
)
def test_a_k_that_does_not_name_one_step_per_row_is_refused(k):
    x = gaussian(0, 2, 3)
    with pytest.raises(REFUSED):
        LinearSde()(published_grid().sigmas).mean(k, x, x)


def test_latents_that_would_broadcast_are_refused():
    table, x = LinearSde()(published_grid().sigmas), gaussian(0, 2, 3)
    with pytest.raises(REFUSED):
        table.log_prob(0, x, x, x[:, :1])
    with pytest.raises(REFUSED):
        table.kl(0, x, x[:1])


@pytest.mark.parametrize("kind", [LinearSde, FlowSde, ConstantSde, Cps])
@pytest.mark.parametrize("eta", [0.0, -1.0, math.inf, math.nan])
def test_an_eta_that_is_no_scale_is_refused(kind, eta):
    with pytest.raises(ValueError, match="eta"):
        kind(eta)


def test_cps_replaces_at_most_all_of_the_noise():
    assert Cps(1.0)(published_grid().sigmas).c.abs().max() < 1e-15
    with pytest.raises(ValueError, match=r"from 1e-15 to 1, not 1\.1"):
        Cps(1.1)


@pytest.mark.parametrize("kind", [LinearSde, FlowSde, ConstantSde])
@pytest.mark.parametrize("num_steps", [2, 20, 1000])
def test_the_largest_eta_leaves_latents_whose_squares_float32_holds(kind, num_steps):
    """A walk from 1 to 0 with eta 5, by a network whose output is bounded; uniform and shifted grids."""
    for shift in (1.0, 8.0):
        table = kind(eta=5.0)(shifted_grid(num_steps, shift).sigmas)
        x, v = gaussian(0, 1, 64), gaussian(1, 1, 64)
        for k in range(num_steps):
            x = table.sample(k, x, v, gaussian(k, 1, 64))
        assert x.square().isfinite().all()
    with pytest.raises(ValueError, match="must be from 1e-15 to 5, not 20"):
        kind(eta=20.0)


@pytest.mark.parametrize(
    "sigmas",
    [[1.0], [1.0, 1.0, 0.0], [0.0, 0.5, 1.0], [1.1, 0.5, 0.0], [1.0, 0.0, -0.1], [1.0, math.nan, 0.0], [[1.0, 0.0]]],
)
def test_grids_that_do_not_fall_from_one_to_zero_are_refused(sigmas):
    with pytest.raises(REFUSED):
        Ode()(torch.tensor(sigmas))
