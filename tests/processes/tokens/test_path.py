"""Paths of uniform tokens against arithmetic by hand: three codes at 0, 90 and 180 degrees, c 3, alpha 0.9."""

import pytest
import torch

from flashgrpo.processes.tokens.chunks import categorical
from flashgrpo.processes.tokens.uniform.path import MetricPath, MixturePath, jumped, make_path
from flashgrpo.processes.tokens.uniform.settings import Metric, Mixture, grid

CODES = torch.tensor([[2.0, 0.0], [0.0, 0.5], [-1.0, 0.0]])  # normalised by the path
PATH = MetricPath(CODES, Metric())
ZERO = torch.zeros(1, 1, dtype=torch.int64)


def at(t: float) -> torch.Tensor:
    return torch.tensor([t], dtype=torch.float64)


def jumps(path, t, s, z, kind="derivative"):
    return path.jumps(t, s, torch.tensor([[z]]), ZERO, kind)[0, 0]


def test_beta_and_its_derivative():
    assert [PATH.beta(t) for t in (0.25, 0.5, 0.75)] == pytest.approx([1.116123, 3, 8.063626], rel=1e-6)
    found = [PATH.beta_derivative(t) for t in (0.25, 0.5, 0.75)]
    assert found == pytest.approx([5.357391, 10.8, 38.705405], rel=1e-6)
    assert (PATH.beta(0.0), PATH.beta_derivative(0.0)) == (0, 0)


def test_distances_are_those_of_normalised_codes():
    tokens = torch.tensor([[0, 1, 2]])
    expected = torch.tensor([[[0.0, 2, 4], [2, 0, 2], [4, 2, 0]]])
    torch.testing.assert_close(PATH.distances(tokens), expected, rtol=0, atol=1e-6)


def test_probabilities_and_rates_at_one_half():
    torch.testing.assert_close(
        PATH.probs(at(0.5), ZERO)[0, 0], torch.tensor([0.99752126, 0.00247261, 6.13e-6]), rtol=1e-3, atol=1e-8
    )
    torch.testing.assert_close(jumps(PATH, 0.5, 1.5, 2), torch.tensor([43.0929, 0.0534083, 0]), rtol=1e-5, atol=1e-6)
    assert float(-torch.expm1(-jumps(PATH, 0.5, 0.6, 2).sum())) == pytest.approx(0.98662854, rel=1e-5)


def test_the_first_step_moves_with_differences_and_not_with_derivatives():
    assert PATH.beta(0.1) == pytest.approx(0.4152436, rel=1e-6)
    found = jumps(PATH, 0.0, 0.1, 2, "difference")
    torch.testing.assert_close(found, torch.tensor([0.5536582, 0.2768291, 0]), rtol=1e-5, atol=1e-6)
    assert float(-torch.expm1(-found.sum())) == pytest.approx(0.5641631, rel=1e-5)
    assert not jumps(PATH, 0.0, 0.1, 2).any()


@pytest.mark.parametrize("path", [PATH, MixturePath(3)], ids=["metric", "mixture"])
@pytest.mark.parametrize("t", [0.2, 0.6])
def test_rates_solve_the_forward_equation(path, t):
    """d p_t / dt = what flows in less what flows out, with rates by `derivative`."""
    h = 1e-3
    change = (path.probs(at(t + h), ZERO) - path.probs(at(t - h), ZERO))[0, 0] / (2 * h)
    p, rates = path.probs(at(t), ZERO)[0, 0], torch.stack([jumps(path, t, t + 1, z) for z in range(3)])
    torch.testing.assert_close(change, p @ rates - p * rates.sum(dim=1), rtol=1e-3, atol=2e-4)


def marginals_apart(path, kind: str, steps: int = 10) -> list[float]:
    """Total variation between the sampler's marginal and p_t under a fixed clean token, at the end of each step."""
    q, found = torch.full((path.vocabulary,), 1 / path.vocabulary), []
    for k in range(steps - 1):
        t, s = k / steps, (k + 1) / steps
        moved = torch.stack([jumps(path, t, s, z, kind) for z in range(path.vocabulary)])
        total = moved.sum(dim=1)
        leaves = -torch.expm1(-total)
        step = leaves[:, None] * moved / total.clamp(min=1e-30)[:, None]
        q = q @ (step + torch.diag(1 - leaves))
        found.append(float((q - path.probs(at(s), ZERO)[0, 0]).abs().sum() / 2))
    return found


def test_the_samplers_marginals_are_nearer_to_the_path_with_differences():
    assert marginals_apart(PATH, "derivative")[:5] == pytest.approx([0.282, 0.165, 0.072, 0.024, 0.006], abs=6e-4)
    assert marginals_apart(PATH, "difference")[:5] == pytest.approx([0.076, 0.066, 0.030, 0.009, 0.001], abs=6e-4)


def test_the_samplers_marginals_of_a_mixture_are_exact_with_differences():
    assert max(marginals_apart(MixturePath(3), "difference")) < 1e-6
    assert max(marginals_apart(MixturePath(3), "derivative")) > 0.03


def test_grids():
    assert grid(10, 1.0) == pytest.approx([i / 10 for i in range(11)])
    assert grid(10, 3.0)[:10] == pytest.approx(
        [0, 0.0357, 0.0769, 0.125, 0.1818, 0.25, 0.3333, 0.4375, 0.5714, 0.75], abs=5e-5
    )
    assert grid(10, 5.0)[:10] == pytest.approx(
        [0, 0.0217, 0.0476, 0.0789, 0.1176, 0.1667, 0.2308, 0.3182, 0.4444, 0.6429], abs=5e-5
    )
    assert grid(4, 3.0)[-1] == 1


def test_codes_far_apart_are_almost_pure_noise_where_most_of_the_training_is():
    """P(x_t = x1) for 1,024 random unit codes in 8 dimensions."""
    codes = torch.randn(1024, 8, generator=torch.Generator().manual_seed(0))
    path, x1 = MetricPath(codes, Metric()), torch.arange(0, 1024, 16)[None]
    shares = [float(path.probs(at(t), x1).gather(-1, x1[..., None]).mean()) for t in (0.0, 0.3, 0.5, 0.9)]
    assert shares == pytest.approx([0.001, 0.01, 0.058, 0.978], rel=0.2)


def numbers(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(1, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("path", [MetricPath(CODES, Metric(c=0.5)), MixturePath(3)], ids=["metric", "mixture"])
def test_forward_draws_have_the_probabilities_of_the_path(path):
    """Pearson's chi-square with 2 degrees of freedom: above 13.8 by chance once in a thousand."""
    count = 20_000
    x1 = torch.ones(1, count, dtype=torch.int64)
    drawn = categorical(path.probs(at(0.4), x1), numbers(count))[0].bincount(minlength=3).double()
    expected = path.probs(at(0.4), x1[:, :1])[0, 0].double() * count
    assert float(((drawn - expected) ** 2 / expected).sum()) < 13.8


def test_jumps_are_drawn_with_their_probabilities():
    count = 20_000
    z, x1 = torch.full((1, count), 2), torch.zeros(1, count, dtype=torch.int64)
    s = 0.05
    drawn = jumped(PATH, 0.0, s, z, x1, "difference", numbers(count, 1), numbers(count, 2))[0]
    moved = jumps(PATH, 0.0, s, 2, "difference").double()
    leaves = -torch.expm1(-moved.sum())
    expected = count * (leaves * moved / moved.sum() + torch.tensor([0, 0, 1 - leaves]))
    assert float(((drawn.bincount(minlength=3) - expected) ** 2 / expected).sum()) < 13.8


@pytest.mark.parametrize("path", [PATH, MixturePath(3)], ids=["metric", "mixture"])
def test_at_the_end_of_a_path_is_the_clean_token(path):
    x1 = torch.tensor([[0, 1, 2, 0, 1, 2]])
    for t in (1 - 1e-9, 1.0):
        assert torch.equal(categorical(path.probs(at(t), x1), numbers(6)), x1)
    assert torch.allclose(path.probs(at(0.0), x1), torch.tensor(1 / 3))


def test_categorical_draws_the_kind_at_which_the_sum_exceeds_the_number():
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 0.0]).expand(6, -1)
    draws = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert categorical(weights, draws).tolist() == [1, 1, 2, 2, 4, 4]


def test_a_path_by_distance_needs_codes():
    assert isinstance(make_path(Mixture(), 3, None), MixturePath)
    with pytest.raises(ValueError, match=r"rollout\.path: this model has no code embeddings"):
        make_path(Metric(), 3, None)
