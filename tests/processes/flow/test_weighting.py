"""How much a stochastic step counts: the weights of transitions, and the ratios that they are judged by."""

import math

import pytest
import torch

from flashgrpo.config import RunConfig
from flashgrpo.errors import UserError
from flashgrpo.learning.ratio import policy_losses
from flashgrpo.processes.flow.noise import ConstantSde, Cps, FlowSde, LinearSde, Ode
from flashgrpo.processes.flow.table import StepTable
from flashgrpo.processes.flow.weighting import NoiseLevel, NormalizedRatio, PlainRatio, Rectified, StepLength, Uniform
from tests.published import published_grid

GOLDEN = [1.3381, 1.2602, 1.1832, 1.1072, 1.0323, 0.9585, 0.8859, 0.8145, 0.7444, 0.6757]


def test_golden_weights_of_the_published_window():
    table = LinearSde(eta=1.0)(published_grid().sigmas)
    weights = Rectified().weights(table, range(10), torch.arange(10))
    torch.testing.assert_close(weights.tolist(), GOLDEN, atol=1e-4, rtol=0)
    assert weights.dtype == torch.float32
    assert (weights.diff() < 0).all(), "the weight falls with k"
    assert weights.mean().item() == pytest.approx(1)


def test_window_weights_know_nothing_of_the_batch():
    table = LinearSde()(published_grid().sigmas)
    all_k = torch.tensor([0, 9, 3, 3, 5])
    together = Rectified().weights(table, range(10), all_k)
    alone = [Rectified().weights(table, range(10), k[None]) for k in all_k]
    assert torch.equal(torch.cat(alone), together)
    assert alone[0].item() == pytest.approx(1.3381, abs=1e-4), "one sample does not cancel its own weight"


def three_steps() -> StepTable:
    """A table with 1 / lambda = 3, 2, 1: std is that multiple of |b|."""
    ode = Ode()(torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    return StepTable(ode.sigmas, ode.c, ode.to_v.abs() * torch.tensor([3.0, 2.0, 1.0, 0.0]))


def test_rectified_weights_by_hand():
    table, k = three_steps(), torch.tensor([0, 0, 2])
    assert Rectified().weights(table, [0, 1, 2], k).tolist() == pytest.approx([1.5, 1.5, 0.5])
    assert Rectified().weights(table, [0, 1, 2], torch.tensor([1, 1])).tolist() == [1.0, 1.0]
    assert Rectified().weights(table, [0, 1], torch.tensor([1, 0])).tolist() == pytest.approx([0.8, 1.2])
    assert Uniform().weights(table, [0, 1, 2], k).tolist() == [1.0, 1.0, 1.0]


def test_rectification_evens_out_the_gradient():
    """|w d log_prob / d v| has one mean size for all k, while without w it spreads over a factor of 1.98."""
    table = LinearSde()(published_grid().sigmas)
    k = torch.arange(10)
    x, v, noise = torch.randn(3, 10, 400, generator=torch.Generator().manual_seed(0))
    noise = noise / noise.abs().mean(1, keepdim=True)
    v = v.requires_grad_()
    log_prob = table.log_prob(k, table.sample(k, x, v.detach(), noise), x, v)
    sizes = torch.autograd.grad(log_prob.sum(), v)[0].abs().mean(1)
    assert (sizes.max() / sizes.min()).item() == pytest.approx(1.98, abs=0.01)
    evened = sizes * Rectified().weights(table, range(10), k)
    assert (evened.max() / evened.min()).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("table", "candidates", "k", "named"),
    [
        (Ode()(published_grid().sigmas), [0, 1], [0], "step 0 is not a stochastic step"),
        (Cps()(published_grid().sigmas), [0, 19], [0], "step 19 is not a stochastic step"),
        (LinearSde()(published_grid().sigmas), [0, 1], [20], "step 20 is not a stochastic step"),
        (LinearSde()(published_grid().sigmas), [], [0], "at least one candidate"),
    ],
)
def test_steps_without_rectification_are_refused(table, candidates, k, named):
    for weighting in (Rectified(), NoiseLevel(), StepLength()):
        with pytest.raises(ValueError, match=named):
            weighting.weights(table, candidates, torch.tensor(k))


def test_only_the_mean_over_the_window_is_taken():
    """Recipes may still name it; another mean is refused by its name, and the value has no such setting."""
    config = RunConfig.load("tiny", ["algorithm.weighting={kind: rectified, over: window}"])
    assert config.algorithm.score.weighting == Rectified()
    for other in ("batch", "update"):
        with pytest.raises(UserError, match=rf"weighting\.over: .{other}. is gone.*window"):
            RunConfig.load("tiny", [f"algorithm.weighting={{kind: rectified, over: {other}}}"])
    with pytest.raises(TypeError):
        Rectified(over="batch")


def four_steps() -> StepTable:
    """Steps of length 0.25, 0.25, 0.3, 0.2 with std 0.3, 0.2, 0.1, 0."""
    ode = Ode()(torch.tensor([1.0, 0.75, 0.5, 0.2, 0.0], dtype=torch.float64))
    return StepTable(ode.sigmas, ode.c, torch.tensor([0.3, 0.2, 0.1, 0.0], dtype=torch.float64))


def test_noise_level_weights_by_hand():
    """std 0.3, 0.2, 0.1 over their mean 0.2; over the first two candidates alone, whose mean is 0.25, 1.2 and 0.8."""
    k = torch.tensor([0, 1, 2, 0])
    assert NoiseLevel().weights(four_steps(), [0, 1, 2], k).tolist() == pytest.approx([1.5, 1.0, 0.5, 1.5])
    assert NoiseLevel().weights(four_steps(), [0, 1], k[:2]).tolist() == pytest.approx([1.2, 0.8])


def test_step_length_weights_by_hand():
    """1/d = 4, 4, 10/3 over their mean 34/9."""
    weights = StepLength().weights(four_steps(), [0, 1, 2], torch.tensor([0, 1, 2]))
    assert weights.tolist() == pytest.approx([36 / 34, 36 / 34, 30 / 34])


@pytest.mark.parametrize("weighting", [NoiseLevel(), StepLength()])
@pytest.mark.parametrize("kind", [LinearSde(), FlowSde(), ConstantSde(), Cps()])
def test_weights_of_a_step_know_nothing_of_the_batch(weighting, kind):
    """Micro-batches, and ranks, that see other steps agree on a step's weight; over the window the mean is 1."""
    table, candidates = kind(published_grid().sigmas), range(3, 10)
    k = torch.tensor([9, 3, 5, 5, 8])
    together = weighting.weights(table, candidates, k)
    parts = [weighting.weights(table, candidates, rows) for rows in (k[:2], k[2:3], k[3:])]
    assert torch.equal(torch.cat(parts), together)
    assert weighting.weights(table, candidates, torch.tensor(candidates)).mean().item() == pytest.approx(1)


def test_noise_levels_of_the_published_window():
    """g sqrt(d) with g = sigma_1 sigma, as the grid ends at 0: the early steps are short and have less noise."""
    sigmas = published_grid().sigmas.tolist()
    std = [sigmas[1] * sigmas[k] * math.sqrt(sigmas[k] - sigmas[k + 1]) for k in range(10)]
    weights = NoiseLevel().weights(LinearSde(eta=1.0)(published_grid().sigmas), range(10), torch.arange(10))
    assert weights.tolist() == pytest.approx([value / math.fsum(std) * 10 for value in std])
    assert weights[0] < weights[9]


def stepped(table: StepTable, rows: int = 8, dims: int = 200, moved: float = 0.0, seed: int = 0):
    """Transitions of steps 1, 2, ... and a velocity that has moved from the one that drew them."""
    k = torch.arange(rows) % (table.num_steps - 2) + 1
    x, old_v, noise, shift = torch.randn(4, rows, dims, generator=torch.Generator().manual_seed(seed))
    x_next = table.sample(k, x, old_v, noise)
    v = (old_v + moved * shift).requires_grad_()
    return k, noise, old_v, v, table.log_prob(k, x_next, x, v), table.log_prob(k, x_next, x, old_v)


def log_ratio(ratio, table, k, old_v, v, log_prob, old_log_prob):
    new, old = ratio.scores(table, k, log_prob, old_log_prob, v, old_v)
    return new - old


def test_normalized_ratio_by_hand():
    """std 0.5, xi = (1, -2), shift (0.1, 0.1): log r = -0.1 - 0.02, and RatioNorm leaves mean(xi shift) = -0.05."""
    sigmas = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    table = StepTable(sigmas, torch.tensor([0.5, 0.0]).double(), torch.tensor([0.5, 0.0]).double())
    assert table.to_v[0] == -0.5
    k, x, old_v = torch.tensor([0]), torch.zeros(1, 2), torch.zeros(1, 2)
    v = old_v - 0.2  # times b = -0.5 is the shift of the mean
    x_next = table.sample(k, x, old_v, torch.tensor([[1.0, -2.0]]))
    scores = [table.log_prob(k, x_next, x, velocity) for velocity in (v, old_v)]
    assert log_ratio(PlainRatio(), table, k, old_v, v, *scores).item() == pytest.approx(-0.12, abs=1e-6)
    assert log_ratio(NormalizedRatio(), table, k, old_v, v, *scores).item() == pytest.approx(-0.05, abs=1e-6)


@pytest.mark.parametrize("kind", [LinearSde(), FlowSde(), ConstantSde(), Cps()])
def test_normalized_ratio_is_the_noise_along_the_shift_of_the_mean(kind):
    """Eq. 8: std (log r + KL) = mean(xi (mean - old mean)), whatever the noise kind."""
    table = kind(torch.linspace(1, 0, 11, dtype=torch.float64))
    k, noise, old_v, v, log_prob, old_log_prob = stepped(table, moved=0.5)
    shift = table.to_v[k].float()[:, None] * (v - old_v)
    found = log_ratio(NormalizedRatio(), table, k, old_v, v, log_prob, old_log_prob)
    torch.testing.assert_close(found, (noise * shift).mean(1), atol=2e-6, rtol=1e-4)


def test_normalized_ratio_takes_out_the_bias_and_the_step():
    """400 draws a step with one rms shift of the mean: log r is negative on average and spreads as 1 / std; log r' is
    centred and spreads alike at every step."""
    table = FlowSde()(published_grid().sigmas)
    dims, draws, size = 64, 400, 0.3
    plain, normalized = [], []
    for step in range(2, 18):
        x, old_v, noise = torch.randn(3, draws, dims, generator=torch.Generator().manual_seed(step))
        v = old_v + size / table.to_v[step].abs().float()
        k = torch.full((draws,), step)
        x_next = table.sample(k, x, old_v, noise)
        scores = [table.log_prob(k, x_next, x, velocity) for velocity in (v, old_v)]
        plain.append(log_ratio(PlainRatio(), table, k, old_v, v, *scores))
        normalized.append(log_ratio(NormalizedRatio(), table, k, old_v, v, *scores))
    plain, normalized = torch.stack(plain), torch.stack(normalized)
    assert (plain.mean(1) < -3 * plain.std(1) / draws**0.5).all(), "biased below 0 at every step"
    assert plain.std(1).max() / plain.std(1).min() > 3
    assert (normalized.mean(1).abs() < 5 * normalized.std(1) / draws**0.5).all()
    assert normalized.std(1).max() / normalized.std(1).min() < 1.3
    torch.testing.assert_close(normalized.std(), torch.tensor(size / dims**0.5), rtol=0.05, atol=0)


@pytest.mark.parametrize("ratio", [PlainRatio(), NormalizedRatio()])
def test_the_ratio_of_a_policy_that_has_not_moved_is_one_bit_for_bit(ratio):
    table = LinearSde()(published_grid().sigmas)
    k, _, old_v, v, log_prob, _ = stepped(table)
    new, old = ratio.scores(table, k, log_prob, log_prob.detach(), v, old_v)
    assert torch.equal((new - old).exp(), torch.ones(len(k)))


def test_the_plain_ratio_hands_on_what_it_was_given():
    rows = torch.zeros(2), torch.ones(2)
    assert all(
        a is b for a, b in zip(PlainRatio().scores(three_steps(), rows[0].long(), *rows, *rows), rows, strict=True)
    )


def test_normalized_ratio_has_the_gradient_of_its_formula():
    """By autograd and by central differences, at a policy that has moved."""
    table = ConstantSde()(torch.linspace(1, 0, 6, dtype=torch.float64))
    k, noise, old_v, v, _, old_log_prob = stepped(table, rows=2, dims=6, moved=0.8)
    x = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(0))[0]
    x_next = table.sample(k, x, old_v, noise)

    def total(velocity: torch.Tensor) -> torch.Tensor:
        return log_ratio(
            NormalizedRatio(), table, k, old_v, velocity, table.log_prob(k, x_next, x, velocity), old_log_prob
        ).sum()

    (found,) = torch.autograd.grad(total(v), v)
    torch.testing.assert_close(found, table.to_v[k].float()[:, None] * noise / 6, atol=1e-5, rtol=1e-4)
    for place in ((0, 0), (1, 4)):
        step = torch.zeros_like(v)
        step[place] = 0.05
        with torch.no_grad():
            difference = (total(v + step) - total(v - step)) / 0.1
        assert difference.item() == pytest.approx(found[place].item(), abs=2e-5)


def first_gradient(table: StepTable, weighting, ratio, seed: int = 0) -> torch.Tensor:
    """The gradient of the first optimizer step by the velocities, with advantages 1, over the first ten steps."""
    k, _, old_v, v, log_prob, _ = stepped(table, rows=9, seed=seed)
    new, old = ratio.scores(table, k, log_prob, log_prob.detach(), v, old_v)
    weight = weighting.weights(table, range(10), k)
    losses = policy_losses(new, old, torch.ones(9), weight, 1e-3)
    return torch.autograd.grad(losses.sum(), v)[0]


@pytest.mark.parametrize("kind", [LinearSde(), FlowSde(), ConstantSde(), Cps()])
def test_noise_level_weights_have_the_first_gradient_of_the_normalized_ratio(kind):
    """Both count a step for std lambda = |b|: until ratios are clipped, TempFlow-GRPO is RatioNorm times a constant."""
    table = kind(published_grid().sigmas)
    tempflow = first_gradient(table, NoiseLevel(), PlainRatio())
    ratio_norm = first_gradient(table, Uniform(), NormalizedRatio())
    torch.testing.assert_close(tempflow * table.std[:10].mean().float(), ratio_norm, rtol=1e-4, atol=1e-8)


def test_grpo_guard_has_the_first_gradient_of_rectification():
    """|b| / d is 1 + eta^2 / 2 for `FlowSde` from the second step on, so 1/d and 1/|b| weigh steps alike."""
    table = FlowSde(eta=0.7)(published_grid().sigmas)
    lengths = -table.sigmas.diff()
    assert (table.to_v.abs() / lengths)[1:].tolist() == pytest.approx([1 + 0.49 / 2] * 19)
    guard = first_gradient(table, StepLength(), NormalizedRatio()) * (1 / lengths[:10]).mean().float()
    rectified = first_gradient(table, Rectified(), PlainRatio()) * table.rectification[:10].mean().float()
    torch.testing.assert_close(guard, rectified * (1 + 0.49 / 2), rtol=1e-4, atol=1e-8)
    linear = LinearSde()(published_grid().sigmas)
    assert (linear.to_v.abs() / -linear.sigmas.diff()).max().item() < 1.125  # nearly even: 1 + sigma (1 - sigma) / 2
